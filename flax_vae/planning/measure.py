"""What compiling a program ahead of time has shown: what it takes, or that it does not fit."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax

from flax_vae.planning.chips import Chip
from flax_vae.planning.hlo import Program, program
from flax_vae.planning.request import Report
from flax_vae.planning.roofline import seconds

REFUSED = [  # what the compiler says of a program that does not fit: needed, and available
    re.compile(r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm", re.IGNORECASE),
    re.compile(r"\(([\d.]+)([BKMGT]?)\) exceeds available HBM \(([\d.]+)([BKMGT]?)\)", re.IGNORECASE),
]


def measured(report: Report, compiled: jax.stages.Compiled, chip: Chip | None) -> Report:
    """Completes the report with what the compiled program takes."""
    memory = memory_of(compiled)
    needed = None if memory is None else sum(memory.values()) - 2 * memory["aliased"]
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


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Gives the bytes that a program takes on a device by what they are for, where jax tells."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def by_kind(found: Program) -> list[dict[str, Any]]:
    """Adds up the exchanges of each kind: how many, and the bytes that each device gets of them."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for each, count in found.exchanges.items():
        sums[each.kind][0] += count
        sums[each.kind][1] += count * each.bytes
    return [{"kind": kind, "count": count, "bytes": size} for kind, (count, size) in sorted(sums.items())]


def refused(message: str) -> tuple[int, int]:
    """Reads how much memory a program needs, and how much there is, where the compiler refused it for that."""
    for pattern in REFUSED:
        if found := pattern.search(message):
            needed, unit, available, other = found.groups()
            return binary(needed, unit), binary(available, other)
    raise RuntimeError(message)


def binary(number: str, unit: str) -> int:
    """Reads 15.75 and G as bytes."""
    return int(float(number) * 1024 ** "BKMGT".index(unit.upper() or "B"))
