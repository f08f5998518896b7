"""What a compiled program takes, or by how much it does not fit."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax

from flax_vae.planning.chips import Chip
from flax_vae.planning.hlo import Program, program
from flax_vae.planning.request import Report
from flax_vae.planning.roofline import seconds

REFUSALS = [  # the compiler's messages on a program that does not fit: bytes needed, and available
    re.compile(r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm", re.IGNORECASE),
    re.compile(r"\(([\d.]+)([BKMGT]?)\) exceeds available HBM \(([\d.]+)([BKMGT]?)\)", re.IGNORECASE),
]
USES = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}  # names in jax
USES |= {"code": "generated_code"}


def measured(report: Report, compiled: jax.stages.Compiled, chip: Chip | None) -> Report:
    """Returns a report completed from a compiled program; times only for a known chip."""
    sizes = compiled.memory_analysis()  # None where jax does not tell
    memory = {use: getattr(sizes, f"{name}_size_in_bytes") for use, name in USES.items()} if sizes else None
    needed = sum(memory.values()) - 2 * memory["aliased"] if memory else None  # aliased: in arguments and outputs
    found = program(compiled.as_text() or "")
    times = seconds(found, chip, report.devices) if chip else None
    return replace(
        report,
        needed=needed,
        fits=None if needed is None or report.available is None else needed <= report.available,
        memory=memory,
        flops=found.flops,
        bytes=found.bytes,
        collectives=by_kind(found),
        seconds=times,
        bound=max(times, key=lambda name: times[name]) if times else None,
        loops_of_unknown_length=found.endless,
    )


def by_kind(found: Program) -> list[dict[str, Any]]:
    """Returns the number of collectives of each kind, and the bytes that each device receives by them."""
    counts, sizes = Counter[str](), Counter[str]()
    for each, count in found.exchanges.items():
        counts[each.kind] += count
        sizes[each.kind] += count * each.bytes
    return [{"kind": kind, "count": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)]


def refused(message: str) -> tuple[int, int]:
    """Parses the compiler's message on a program that does not fit: bytes needed, and available."""
    for pattern in REFUSALS:
        if found := pattern.search(message):
            needed, unit, available, other = found.groups()
            return binary(needed, unit), binary(available, other)
    raise RuntimeError(message)


def binary(number: str, unit: str) -> int:
    """Returns the bytes of 15.75 and G."""
    return int(float(number) * 1024 ** "BKMGT".index(unit.upper() or "B"))
