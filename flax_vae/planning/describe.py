"""Reports of compiled programs in words: rows of a table, and sentences; importable without jax."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from flax_vae.planning.request import Report, Request


def report_json(report: Report) -> dict[str, Any]:
    """Returns all fields of a report, with the longest of its times."""
    return asdict(report) | {"at_least_seconds": report.longest if report.seconds else None}


def title(request: Request) -> str:
    """Returns what is asked for, in one line."""
    clips = f"{request.batch} x {request.frames} frames of {request.height}x{request.width}"
    what = f"{request.job}, {request.model} model, {clips}, {request.precision}, on {request.topology}"
    return f"{what}, {settings(request)}" if request.mesh else what


def settings(request: Request) -> str:
    """Returns, in one line, the settings between which a search chooses."""
    from flax_vae.runtime.mesh import mesh_name

    chosen = [mesh_name(request.mesh)]
    chosen += ["remat"] * request.remat + ["fsdp"] * request.fsdp + ["frame by frame"] * request.frame_by_frame
    return ", ".join([*chosen, *([f"chunks of {request.chunk}"] if request.chunk else [])])


def rows(report: Report) -> Iterator[Sequence[object]]:
    """Yields (name, value) of what a report holds; a device is a chip, but half of one on v7x."""
    yield "devices", f"{report.devices} x {report.device_kind}"
    yield "memory of a device, needed", amount(report.needed)
    yield "memory of a device, there", amount(report.available)
    for name, size in (report.memory or {}).items():
        yield f"  {name}", amount(size)
    if report.flops is not None:
        yield "flops of a device", f"{scaled(report.flops)}, of convolutions and products"
        yield "bytes of a device", amount(report.bytes)
    for entry in report.collectives or ():
        yield f"  {entry['kind']}", f"{entry['count']:,} times, {amount(entry['bytes'])}"
    for name, seconds in (report.seconds or {}).items():
        yield f"time by {name}, at least", duration(seconds) + (", the bound" if name == report.bound else "")
    if report.compile_seconds is not None:
        yield "compiling took", duration(report.compile_seconds)
    if report.loops_of_unknown_length:
        yield "loops counted as one turn", report.loops_of_unknown_length


def verdict(report: Report) -> str:
    """Returns whether the program fits, and how fast it can be at best."""
    if report.fits is None:
        return f"needs {amount(report.needed)} on each device; what there is is not known"
    of = f"needs {amount(report.needed)} of {amount(report.available)}"
    if not report.fits:
        return f"does not fit: {of}"
    best = f"; at least {duration(report.longest)}, bound by {report.bound}" if report.bound else ""
    return f"fits: {of}{best}"


def amount(size: int | None) -> str:
    """Formats bytes of memory."""
    from flax_vae.runtime.memory import format_bytes

    return "not known" if size is None else format_bytes(size)


def scaled(number: float) -> str:
    """Formats a number with three digits and a prefix: 1.92 G."""
    unit, factor = next(((u, f) for u, f in (("P", 1e15), ("T", 1e12), ("G", 1e9)) if number >= f), ("M", 1e6))
    return f"{number / factor:.3g} {unit}"


def duration(seconds: float) -> str:
    """Formats seconds with three digits, in the largest unit that they fill."""
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    return f"{seconds * factor:.3g} {unit}"


def bound_words(report: Report) -> str:
    """Formats the longest of a report's times and what takes it."""
    return f"{duration(report.longest)} ({report.bound})" if report.seconds else ""
