"""What a compiled program does on each device, read from its text: flops, bytes of memory, and collectives.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from math import prod

from flax_vae.planning.hlo_flops import flops
from flax_vae.planning.hlo_text import Computation, Instruction, Stored, parse
from flax_vae.planning.hlo_traffic import traffic

KINDS = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
GROUPS = re.compile(
    r"replica_groups=\{\{([\d,]*)\}|replica_groups=\[\d+,(\d+)\]|replica_groups=mesh\[(.*?)\] \{(.*?)\}"
)


@dataclass(frozen=True)
class Collective:
    """An exchange between devices; equal ones are one entry, with how often they happen."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dims of what each device gets
    bytes: int  # of these arrays
    devices: int  # that exchange with one another; 0 for all
    computation: str

    @property
    def shape(self) -> str:
        """Its arrays in words, as bf16[8,128]."""
        return ", ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in self.arrays)


@dataclass(frozen=True)
class Program:
    """The work of one device: flops of convolutions and matrix products, bytes of its large memory, exchanges."""

    flops: int = 0
    bytes: int = 0
    exchanges: Counter[Collective] = field(default_factory=Counter)
    endless: int = 0  # loops whose number of turns the text does not tell, counted as one

    def __add__(self, other: Program) -> Program:
        exchanges = Counter(self.exchanges)
        exchanges.update(other.exchanges)
        return Program(self.flops + other.flops, self.bytes + other.bytes, exchanges, self.endless + other.endless)

    def __mul__(self, times: int) -> Program:
        exchanges = Counter({each: times * count for each, count in self.exchanges.items()})
        return Program(times * self.flops, times * self.bytes, exchanges, self.endless)

    @property
    def collectives(self) -> list[tuple[str, int, str, int]]:
        """Kind, bytes, shape and count of each exchange, those with the most bytes first."""
        found = [(each.kind, each.bytes, each.shape, count) for each, count in self.exchanges.items()]
        return sorted(found, key=lambda entry: -entry[1] * entry[3])


def program(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Bytes are what instructions take from memory and put into it: a fusion its operands and results, a slice what it
    cuts out, and nothing what only renames arrays or lies in vector memory. Of a conditional all branches count.
    """
    entry, computations = parse(text)

    @cache
    def cost(name: str, is_fused: bool) -> Program:
        computation, total = computations[name], Program()
        for each in computation.instructions.values():
            moved = 0 if is_fused else traffic(each, computation, computations)
            exchanges = Counter([found]) if (found := collective(each, name)) else Counter()
            total += Program(flops(each, computation), moved, exchanges)
            total += called(each, is_fused)
        return total

    def called(each: Instruction, is_fused: bool) -> Program:
        if each.opcode == "while":
            turns = trips(each, computations)
            (body,) = each.called("body")
            return cost(body, is_fused) * (turns or 1) + Program(endless=turns is None)
        keys = ("calls", "branch_computations", "true_computation", "false_computation", "called_computations")
        names = each.called(*keys, *(["to_apply"] if each.opcode == "call" else []))
        inside = is_fused or each.opcode in ("fusion", "custom-call")
        return sum((cost(name, inside) for name in names), Program())

    return cost(entry, False)


def collectives(text: str) -> list[Collective]:
    """Lists the exchanges of a program, each once however often it happens; see `Program.exchanges` for how often."""
    return list(program(text).exchanges)


def collective(each: Instruction, computation: str) -> Collective | None:
    """Reads an instruction that exchanges arrays, or begins to; None for any other."""
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays: tuple[Stored, ...] = each.arrays
    if kind != each.opcode and kind != "all-reduce":  # which gives its operands, then the results
        arrays = arrays[len(each.operands) : 2 * len(each.operands)]
    return Collective(
        kind,
        tuple((array.dtype, array.dims) for array in arrays),
        sum(array.bytes for array in arrays),
        group(each.attributes),
        computation,
    )


def group(attributes: str) -> int:
    """Gives how many devices exchange with one another, or 0 where the text names no groups."""
    found = GROUPS.search(attributes)
    if not found:
        return 0
    listed, tiled, mesh, axes = found.groups()
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes) if axis in sizes)
    return int(tiled) if tiled else len(listed.split(","))


def trips(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """Gives how often a loop runs: as XLA noted it, else the one whole number that its condition compares with."""
    if known := TRIPS.search(loop.attributes):
        return int(known[1])
    (condition,) = loop.called("condition")
    limits = {
        int(each.operands[0])
        for each in computations[condition].instructions.values()
        if each.opcode == "constant"
        and each.arrays[0].dtype in ("s32", "u32", "s64", "u64")
        and not each.arrays[0].dims
    }
    return limits.pop() if len(limits) == 1 else None
