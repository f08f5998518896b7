"""What training and decoding ask of a chip, from 1 chip to 256, on paper: python -m benchmarks.scaling

Compiles the released model for TPUs that need not be there, as `flax-vae plan` does, and writes what it finds beside
docs/scaling.md: plans.json, which keeps every plan so that one is compiled once, and weak_scaling.png. Prints both
tables of that page. A step of training takes half an hour to compile, one core, and up to 14 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro

from flax_vae.io.files import replacing
from flax_vae.jobs.screen import note
from flax_vae.planning.compile_ahead import compiled_ahead
from flax_vae.planning.describe import amount, duration, scaled
from flax_vae.planning.request import Report, Request
from flax_vae.planning.wanted import Wanted, request_of, with_mesh

PLANS = [
    "train --topology v5e:4x4 --batch 16 --fsdp",
    "train --topology v5e:4x4 --batch 16 --fsdp --no-remat",
    "train --topology v5p:2x2x2 --batch 32",
    "decode --topology v5e:1x1 --batch 1 --frames 121 --size 720x1280 --precision bfloat16 --frame-by-frame",
    "decode --topology v5e:2x4 --batch 1 --frames 121 --size 720x1280 --precision bfloat16 --mesh width=8 --chunk 8",
]
CHIPS = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
WEAK = "train --topology v5e:{shape} --batch {chips} --fsdp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/scaling"), help="folder to keep the plans in")
    parser.add_argument("--at-once", type=int, default=1, help="programs to compile at a time")
    parser.add_argument("--kept", action="store_true", help="compile nothing: print and draw what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    weak = {chips: WEAK.format(shape=shape, chips=chips) for chips, shape in CHIPS.items()}
    reports = found([*PLANS, *weak.values()], args.out / "plans.json", 0 if args.kept else args.at_once)
    print(plan_table({words: reports[words] for words in PLANS if words in reports}))
    scaling = {chips: reports[words] for chips, words in weak.items() if words in reports}
    if scaling:
        print(scaling_table(scaling))
        draw(scaling, args.out / "weak_scaling.png")


def found(commands: Sequence[str], path: Path, at_once: int) -> dict[str, Report]:
    """Returns the reports by their commands; those that are not in the file `path` are compiled and added to it."""
    kept = [read(values) for values in json.loads(path.read_text())] if path.exists() else []
    asked = {words: requested(words) for words in commands}
    missing = [request for request in asked.values() if all(report.request != request for report in kept)]
    for request, report in compiled_ahead(missing, at_once) if at_once else ():
        if isinstance(report, ValueError):
            raise report
        note(f"{request.job} on {request.topology}: compiled in {duration(report.compile_seconds or 0)}")
        kept.append(report)
        with replacing(path) as part:
            part.write_text(json.dumps([asdict(report) for report in kept], indent=1) + "\n")
    by_request = {json.dumps(asdict(report.request)): report for report in kept}
    named = {words: by_request.get(json.dumps(asdict(request))) for words, request in asked.items()}
    return {words: report for words, report in named.items() if report is not None}


def requested(words: str) -> Request:
    """Reads what follows `flax-vae plan`."""
    wanted = tyro.cli(Wanted, args=words.split())
    return with_mesh(request_of(wanted), wanted.mesh)


def read(values: dict[str, Any]) -> Report:
    """Builds a report from its JSON."""
    return Report(**{**values, "request": Request(**values["request"])})


def exchanged(report: Report) -> int:
    """Sums the bytes that a chip receives from others."""
    return sum(entry["bytes"] for entry in report.collectives or ())


def plan_table(reports: dict[str, Report]) -> str:
    """Returns a row for each plan, in Markdown."""
    lines = ["| flax-vae plan | memory | flops | bytes | exchanged | at least |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for words, report in reports.items():
        memory = f"{amount(report.needed)} of {amount(report.available)}"
        work = ["-"] * 3
        if report.fits:
            work = [scaled(report.flops or 0), amount(report.bytes), amount(exchanged(report))]
        least = f"{duration(report.longest)}, by {report.bound}" if report.fits else "does not fit"
        cells = [f"`{words}`", memory, *work, least]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scaling_table(reports: dict[int, Report]) -> str:
    """Returns a row for each number of chips, in Markdown; all is of one chip."""
    lines = ["| chips | memory | flops | bytes | exchanged | flops take | memory takes | exchanges take |"]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for chips, report in reports.items():
        times = [duration(seconds) for seconds in (report.seconds or {}).values()]
        work = scaled(report.flops or 0), amount(report.bytes), amount(exchanged(report))
        lines.append(f"| {' | '.join([str(chips), amount(report.needed), *work, *times])} |")
    return "\n".join(lines) + "\n"


def draw(reports: dict[int, Report], path: Path) -> None:
    """Draws what a chip does, and the times that it takes at least, over the number of chips."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), layout="constrained")
    work, time = figure.subplots(1, 2)
    chips = list(reports)
    curves = {
        "flops (T)": [(report.flops or 0) / 1e12 for report in reports.values()],
        "bytes of memory (GB)": [(report.bytes or 0) / 1e9 for report in reports.values()],
        "bytes exchanged (GB)": [exchanged(report) / 1e9 for report in reports.values()],
    }
    for name, values in curves.items():
        work.plot(chips, [value or float("nan") for value in values], "o-", label=name)  # 0 has no place on a log scale
    for name in ("flops", "memory", "interconnect"):
        time.plot(chips, [(report.seconds or {})[name] for report in reports.values()], "o-", label=name)
    work.set(title="work of a chip in a step", yscale="log")
    time.set(title="seconds that it takes at least", ylim=(0, None))
    for axes in (work, time):
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [str(number) for number in chips])
        axes.set_xlabel("chips, one clip each")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
