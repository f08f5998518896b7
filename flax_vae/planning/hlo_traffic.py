"""Counts the bytes that an instruction of a compiled program reads from HBM and writes to it."""

from collections.abc import Mapping

from flax_vae.planning.hlo_text import Computation, Instruction

FREE_OPCODES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
FREE_OPCODES |= {"while", "conditional", "call", "opt-barrier", "optimization-barrier", "async-start", "async-update"}
FREE_OPCODES |= {"async-done", "iota", "domain", "add-dependency", "replica-id"}
SLICES = {"slice", "dynamic-slice", "gather"}
Computations = Mapping[str, Computation]


def traffic(each: Instruction, computation: Computation, computations: Computations) -> int:
    """Returns the bytes that one instruction reads and writes; none for arrays in vector memory, or only renamed."""
    if each.opcode in FREE_OPCODES:
        return 0
    taken = 0
    if not each.opcode.endswith("-done"):
        for name in computation.instructions.keys() & each.operands:
            if whole := hbm_bytes(computation.instructions[name]):
                taken += min(whole, read_by(each, name, whole, computation, computations))
    given = 0 if each.opcode.endswith("-start") else written(each, computation, computations)
    return taken + given


def hbm_bytes(each: Instruction) -> int:
    """Returns the bytes of an instruction's results in HBM."""
    return sum(array.bytes for array in each.arrays if not array.is_near)


def read_by(each: Instruction, name: str, whole: int, computation: Computation, computations: Computations) -> int:
    """Returns the bytes that an instruction reads of a value: the `whole`, or the slices that it cuts out."""
    index = each.operands.index(name)
    kind = each.opcode.removesuffix("-start")
    if kind in SLICES and index == 0:
        arrays = each.arrays[1:2] if each.opcode.endswith("-start") else each.arrays
        return sum(array.bytes for array in arrays)
    if kind == "dynamic-update-slice" and index == 0:
        return 0  # updated in place
    if each.opcode == "fusion":
        (inside,) = (computations[name] for name in each.called("calls"))
        parameter = inside.parameters[index]
        return sum(read_by(user, parameter, whole, inside, computations) for user in inside.users[parameter])
    if each.opcode == "bitcast" and not each.is_root:
        return sum(read_by(user, each.name, whole, computation, computations) for user in computation.users[each.name])
    return whole


def written(each: Instruction, computation: Computation, computations: Computations) -> int:
    """Returns the bytes that an instruction writes: its results, or the slice that it updates in one."""
    if not hbm_bytes(each):
        return 0
    if each.opcode == "fusion":
        (inside,) = (computations[name] for name in each.called("calls"))
        return min(hbm_bytes(each), result(inside.root, inside, computations))
    return result(each, computation, computations)


def result(each: Instruction, computation: Computation, computations: Computations) -> int:
    operands = [computation.instructions[name] for name in each.operands if name in computation.instructions]
    if each.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in operands[1].arrays)
    if each.opcode == "fusion":
        return written(each, computation, computations)
    if each.opcode == "bitcast" and operands[0].opcode != "parameter":
        return result(operands[0], computation, computations)
    if each.opcode == "tuple":
        return sum(result(operand, computation, computations) for operand in operands)
    return hbm_bytes(each)
