"""Counts the bytes that an instruction of a compiled program takes from the device's memory and puts into it."""

from __future__ import annotations

from collections.abc import Mapping

from flax_vae.planning.hlo_text import Computation, Instruction

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"while", "conditional", "call", "opt-barrier", "optimization-barrier", "async-start", "async-update"}
FREE |= {"async-done", "iota", "domain", "add-dependency"}
SLICES = {"slice", "dynamic-slice", "gather"}
Computations = Mapping[str, Computation]


def traffic(each: Instruction, computation: Computation, computations: Computations) -> int:
    """Counts what one instruction reads and writes; arrays in vector memory are free, as are those only renamed."""
    if each.opcode in FREE:
        return 0
    taken = 0
    if not each.opcode.endswith("-done"):
        names = dict.fromkeys(name for name in each.operands if name in computation.instructions)
        taken = sum(read(name, [each], computation, computations) for name in names)
    given = 0 if each.opcode.endswith("-start") else written(each, computation, computations)
    return taken + given


def far_bytes(each: Instruction) -> int:
    """Counts the arrays that it gives, those in the device's large memory."""
    return sum(array.bytes for array in each.arrays if not array.is_near)


def read(name: str, users: list[Instruction], computation: Computation, computations: Computations) -> int:
    """Counts what `users` read of a value: all of it, or only the slices that they cut out of it."""
    whole = far_bytes(computation.instructions[name])
    return min(whole, sum(read_by(each, name, whole, computation, computations) for each in users)) if whole else 0


def read_by(each: Instruction, name: str, whole: int, computation: Computation, computations: Computations) -> int:
    place = each.operands.index(name)
    kind = each.opcode.removesuffix("-start")
    if kind in SLICES and place == 0:
        arrays = each.arrays[1:2] if each.opcode.endswith("-start") else each.arrays
        return sum(array.bytes for array in arrays)
    if kind == "dynamic-update-slice" and place == 0:
        return 0  # changed where it lies
    if each.opcode == "fusion":
        (inside,) = (computations[name] for name in each.called("calls"))
        parameter = inside.parameters[place]
        return sum(read_by(user, parameter, whole, inside, computations) for user in inside.users[parameter])
    if each.opcode == "bitcast" and not each.is_root:
        return sum(read_by(user, each.name, whole, computation, computations) for user in computation.users[each.name])
    return whole


def written(each: Instruction, computation: Computation, computations: Computations) -> int:
    """Counts what an instruction writes: its arrays, or only the slice that it puts into one."""
    if not far_bytes(each):
        return 0
    if each.opcode == "fusion":
        (inside,) = (computations[name] for name in each.called("calls"))
        return min(far_bytes(each), result(inside.root, inside, computations))
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
    return far_bytes(each)
