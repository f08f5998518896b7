"""How fast flax_vae is beside torch, and beside a plain port to JAX: python -m benchmarks

Each task is done in turns, by flax_vae and by one other way at a time, each a process of its own. Other ways are
torch_ref as it is (eager), in channels_last_3d, in torch.compile and in both; and plain, flax_vae with XLA's own
convolutions as nnx.Conv runs them. Tables say how many times as fast flax_vae is, and what memory and compiling take.

    python -m benchmarks --short                         a check: small model, three tasks, a minute or two
    python -m benchmarks --presets small --sizes 9x64    one size of the small model, all tasks and ways
    python -m benchmarks --device gpu                    on a gpu, in TF32 and bfloat16
    python -m benchmarks                                 everything: hours on two cores, and 16 GiB of memory

Run it on a machine that does nothing else. What a way cannot do, for want of memory or of a C++ compiler, is told.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, get_args

import tyro

from benchmarks import speed
from benchmarks import speed_report as report
from benchmarks.options import frames_and_pixels, usual
from benchmarks.peak import free_bytes
from benchmarks.speed import OURS, Device, Measured, Precision, Row, Task, Way
from benchmarks.speed_report import Found
from benchmarks.subjects import Preset, machine
from flax_vae.io.files import replacing
from flax_vae.jobs.screen import note

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
MAX_LOAD = 0.5  # average; most of all torch suffers from more, as its threads wait for each other
PRECISIONS: dict[Device, tuple[Precision, ...]] = {"cpu": ("float32",), "gpu": ("tf32", "bfloat16")}
SIZES: dict[Device, tuple[str, ...]] = {"cpu": ("9x64", "17x64", "9x128"), "gpu": ("9x256", "17x256", "9x512")}


@dataclass(frozen=True)
class Options:
    presets: tuple[Preset, ...] = ("small", "full")
    """models: tiny has 3 million parameters, small 14, full 335"""
    sizes: Annotated[tuple[str, ...], usual(*map(" ".join, SIZES.values()))] = ()
    """clips: 8k + 1 frames x height and width in pixels, a multiple of 8"""
    jobs: tuple[Task, ...] = get_args(Task)
    """gradient is that of the mean squared error of a reconstruction; train is a step of AdamW on L1 and KL"""
    ways: tuple[Way, ...] = get_args(Way)
    """what flax_vae is compared with"""
    rounds: int = 5
    """how often both are timed; ratios are of times in the same round, and the median is told"""
    precision: Annotated[tuple[Precision, ...], usual(*map(" ".join, PRECISIONS.values()))] = ()
    """of weights and of what is computed"""
    device: Device = "cpu"
    """what both frameworks compute on"""
    short: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """take the defaults of a check: small model, 9x64, no training, three rounds, torch without torch.compile"""
    out: Path = Path("benchmark_results")
    """folder for speed.json, which has every time of every round, speed.png, and workers.log"""


SHORT = Options(("small",), (), ("encode", "decode", "gradient"), ("eager", "channels_last_3d"), 3)


def main() -> None:
    """Measures what the command line asks for."""
    defaults = SHORT if "--short" in sys.argv else Options()
    options = tyro.cli(Options, prog="python -m benchmarks", description=__doc__, default=defaults)
    rows = list(rows_of(options))
    options.out.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > MAX_LOAD:
        note(f"load average {os.getloadavg()[0]:.1f}: something else is running, and slows some ways more than others")
    with open(options.out / "workers.log", "wb") as log:
        run(options, rows, log)


def run(options: Options, rows: Sequence[Row], log: IO[bytes]) -> None:
    """Measures rows and prints them; what was found is kept after each."""
    rates = {precision: rates_of(options.device, precision, log) for precision in precisions(options)}
    devices = {str(rate["device"]) for rate in rates.values()} - {"cpu"}
    where = "; ".join([machine().replace(" float32;", ""), *devices, f"{options.rounds} rounds"])
    print(f"# Speed beside torch\n\n{where}", flush=True)
    kept = {"machine": where, "versions": {name: version(name) for name in PACKAGES}, "rates": rates, "rows": []}
    founds: list[Found] = []
    for (preset, precision), group in itertools.groupby(rows, lambda row: (row.preset, row.precision)):
        group = list(group)
        flops = flops_of(group, log)
        print(f"\n## {preset} model, {precision}\n\n{report.heading(options.ways)}", flush=True)
        for row, work in zip(group, flops, strict=True):
            title = f"[{len(founds) + 1}/{len(rows)}] {row.preset}, {row.precision}, {row.name}"
            founds.append(Found(row, work, measured(row, options, title, log)))
            print(report.speed_line(founds[-1], options.ways, max_rate(rates[precision])), flush=True)
            keep(kept, founds[-1], options.out / "speed.json")
            report.draw(founds, options.ways, options.out / "speed.png")
        print(f"\n{report.cost_table(founds[-len(group) :])}", flush=True)
    print(f"{report.reasons(founds)}\n\n{report.verdict(founds)}\n{report.notes(options.rounds, rates)}")


def rows_of(options: Options) -> Iterator[Row]:
    """Yields what is to be measured; SystemExit for sizes that a model does not take."""
    if options.device == "cpu" and "tf32" in options.precision:
        raise SystemExit("--precision tf32: a cpu has none, expected float32 or bfloat16")
    if options.rounds < 1:
        raise SystemExit(f"--rounds {options.rounds}: expected at least 1")
    sizes = [
        frames_and_pixels(text, "--sizes")
        for text in options.sizes or SIZES[options.device][: 1 if options.short else None]
    ]
    for preset, precision in itertools.product(options.presets, precisions(options)):
        for task, (frames, size) in itertools.product(options.jobs, sizes):
            yield Row(preset, precision, task, frames, size)


def precisions(options: Options) -> tuple[Precision, ...]:
    """Returns the precisions asked for, or those usual on the device."""
    return options.precision or PRECISIONS[options.device]


def rates_of(device: Device, precision: Precision, log: IO[bytes]) -> Measured:
    """Measures the flops per second of matmuls in both frameworks; SystemExit where one of them cannot compute."""
    request = {"kind": "rate", "precision": precision}
    try:
        found = {name: speed.asked(name, request, device, log) for name in (OURS, "torch")}
    except speed.Failed as failed:
        raise SystemExit(str(failed)) from None
    return {"device": found[OURS]["device"], **{name: answer["rate"] for name, answer in found.items()}}


def flops_of(rows: Sequence[Row], log: IO[bytes]) -> list[float]:
    """Counts the flops of rows; SystemExit where that fails."""
    try:
        return speed.asked("flops", {"kind": "flops", "rows": [asdict(row) for row in rows]}, "cpu", log)["flops"]
    except speed.Failed as failed:
        raise SystemExit(str(failed)) from None


def measured(row: Row, options: Options, title: str, log: IO[bytes]) -> Measured:
    """Measures flax_vae beside each other way."""
    note(f"{title}: compiling")
    free = free_bytes if options.device == "cpu" else None

    def start(way: str) -> speed.Worker:
        request = {"kind": "task", "row": asdict(row), "free": free and free()}
        return speed.worker(way, request, options.device, log)

    return speed.compared(options.ways, options.rounds, start, lambda text: note(f"{title}: {text}"), free)


def keep(kept: Measured, found: Found, path: Path) -> None:
    """Adds a row to what is kept in a file."""
    ratios = {way: times for way in found.ways if (times := speed.ratio(found.ways, way)) is not None}
    taken = {"seconds": speed.seconds(found.ways, OURS), "ratios": ratios, "best_torch": speed.best_torch(found.ways)}
    kept["rows"].append(asdict(found.row) | {"flops": found.flops, **taken, "ways": found.ways})
    with replacing(path) as part:
        part.write_text(json.dumps(kept, indent=1) + "\n")


def max_rate(rates: Measured) -> float:
    """Returns the rate of matmuls in the framework that is the faster at them."""
    return max(rates[OURS], rates["torch"])


if __name__ == "__main__":
    main()
