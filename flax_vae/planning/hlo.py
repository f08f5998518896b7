"""The work of each device in a compiled program, read from its HLO text: FLOPs, bytes of memory, and collectives.

XLA's own cost analysis counts the body of a loop once; here it counts for each of the loop's trips.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from math import prod

from flax_vae.planning.hlo_flops import flops
from flax_vae.planning.hlo_text import Computation, Instruction, parse
from flax_vae.planning.hlo_traffic import traffic

KINDS = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
GROUPS = re.compile(
    r"replica_groups=\{\{([\d,]*)\}|replica_groups=\[\d+,(\d+)\]|replica_groups=mesh\[(.*?)\] \{(.*?)\}"
)


@dataclass(frozen=True)
class Collective:
    """An exchange between devices; equal ones of one computation are one entry, with a count."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dims of what each device receives
    bytes: int  # of these arrays
    devices: int  # in a group; 0 for all
    computation: str


@dataclass(frozen=True)
class Program:
    """The work of one device: FLOPs of convolutions and matrix products, bytes of HBM, collectives."""

    flops: int = 0
    bytes: int = 0
    exchanges: Counter[Collective] = field(default_factory=Counter)
    endless: int = 0  # loops whose number of trips the text does not tell, counted as one trip

    def __add__(self, other: Program) -> Program:
        exchanges = self.exchanges + other.exchanges
        return Program(self.flops + other.flops, self.bytes + other.bytes, exchanges, self.endless + other.endless)

    def __mul__(self, trips: int) -> Program:
        exchanges = Counter({each: trips * count for each, count in self.exchanges.items()})
        return Program(trips * self.flops, trips * self.bytes, exchanges, self.endless)


def program(text: str) -> Program:
    """Parses `compiled.as_text()`.

    Bytes are those that instructions read from memory and write to it: operands and results of a fusion, the part that
    a slice cuts out, and none where arrays are only renamed or lie in vector memory. All branches of a conditional
    count.
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
            count = trips(each, computations)
            (body,) = each.called("body")
            return cost(body, is_fused) * (count or 1) + Program(endless=count is None)
        keys = ("calls", "branch_computations", "true_computation", "false_computation", "called_computations")
        names = each.called(*keys, *(["to_apply"] if each.opcode == "call" else []))
        inside = is_fused or each.opcode in ("fusion", "custom-call")
        return sum((cost(name, inside) for name in names), Program())

    return cost(entry, False)


def collective(each: Instruction, computation: str) -> Collective | None:
    """Returns the collective that an instruction is, or starts; None for any other instruction."""
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = each.arrays
    if kind != each.opcode and kind != "all-reduce":  # other starts return their operands, then the results
        arrays = arrays[len(each.operands) : 2 * len(each.operands)]
    shapes = tuple((array.dtype, array.dims) for array in arrays)
    return Collective(kind, shapes, sum(array.bytes for array in arrays), group_size(each.attributes), computation)


def group_size(attributes: str) -> int:
    """Returns how many devices exchange with one another, or 0 where the text names no groups."""
    found = GROUPS.search(attributes)
    if not found:
        return 0
    listed, tiled, mesh, axes = found.groups()
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes) if axis in sizes)
    return int(tiled) if tiled else len(listed.split(","))


def trips(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """Returns the trip count of a loop: XLA's note, otherwise the only integer constant in its condition."""
    if known := TRIPS.search(loop.attributes):
        return int(known[1])
    (condition,) = loop.called("condition")
    limits = {
        int(each.operands[0])
        for each in computations[condition].instructions.values()
        if each.opcode == "constant" and not each.arrays[0].dims and re.fullmatch("[su](32|64)", each.arrays[0].dtype)
    }
    return limits.pop() if len(limits) == 1 else None
