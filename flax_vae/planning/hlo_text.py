"""Parses the HLO text of a compiled program, as XLA prints it: computations, their instructions, and their arrays."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
TILE = re.compile(r"T\(([\d,]+)\)")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
CALLED = re.compile(r"(calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)")


@dataclass(frozen=True)
class Stored:
    """An array of a program, on one device."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Its size in memory; a TPU pads the minor axes to whole tiles."""
        dims, order = list(self.dims), [int(axis) for axis in self.layout.split(":")[0].split(",") if axis]
        if tile := TILE.search(self.layout):
            for axis, side in zip(order, reversed(tile[1].split(",")), strict=False):
                dims[axis] = -(-dims[axis] // int(side)) * int(side)
        return math.prod(dims) * bits(self.dtype) // 8

    @property
    def is_near(self) -> bool:
        """Whether it lies in another memory than HBM: vector memory, or the host's."""
        return bool(re.search(r"S\([1-9]", self.layout))


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Stored, ...]  # the results; of a tuple, all in it
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *keys: str) -> tuple[str, ...]:
        """Returns the names of the computations under these keys, as calls, body or branch_computations."""
        found = [names for key, names in CALLED.findall(self.attributes) if key in keys]
        return tuple(name.strip(" %") for names in found for name in names.strip("{}").split(",") if name.strip())


@dataclass(frozen=True)
class Computation:
    """A function of a program; its instructions by name."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose arrays are the result."""
        return next(each for each in self.instructions.values() if each.is_root)

    @cached_property
    def parameters(self) -> dict[int, str]:
        """The names of its parameters by their number."""
        found = (each for each in self.instructions.values() if each.opcode == "parameter")
        return {int(each.operands[0]): each.name for each in found}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have each value as an operand."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for name in dict.fromkeys(each.operands):
                found.get(name, []).append(each)
        return found


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """Returns the name of the entry computation, and all computations; ValueError for any other text."""
    entry, computations, inside = "", {}, None
    for line in text.splitlines():
        if inside is None and (header := HEADER.match(line)):
            inside = computations[header[2]] = Computation(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (found := INSTRUCTION.match(line)):
            inside.instructions[found[2]] = parse_instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("no text of a compiled program: expected one computation that begins with ENTRY")
    return entry, computations


def parse_instruction(name: str, line: str, is_root: bool) -> Instruction:
    """Parses `arrays opcode(operands), attributes`."""
    line = re.sub(r"/\*.*?\*/", "", line)
    opcode = OPCODE.search(line)
    if opcode is None:
        raise ValueError(f"cannot read the instruction {name} = {line[:80]}")
    end = closing(line, opcode.end())
    inside = line[opcode.end() : end]
    operands = re.findall(r"%([\w.\-]+)", inside) or [word.strip() for word in inside.split(",") if word.strip()]
    arrays, attributes = stored(line[: opcode.start()]), line[end + 1 :].lstrip(", ")
    return Instruction(name, opcode[1], arrays, tuple(operands), attributes, is_root)


def closing(line: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one before `start`."""
    depth = 1
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(line)


def stored(text: str) -> tuple[Stored, ...]:
    """Parses the arrays of a shape, `bf16[8,128]{1,0}` or a tuple of them."""
    found = ARRAY.findall(text)
    return tuple(Stored(dtype, tuple(int(n) for n in dims.split(",") if n), layout) for dtype, dims, layout in found)


def bits(dtype: str) -> int:
    """Returns the bits of one value: 16 for bf16, 8 for f8e4m3fn and pred, none for a token."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8 * (dtype == "pred")
