"""Writes docs/figures.md from the measurements in docs/speed: python -m benchmarks.figures

Renders the JSON files that `python -m benchmarks` and `python -m benchmarks.layers` have kept, by the tables of these
two; nothing is measured.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import tyro

from benchmarks import __main__ as benchmark
from benchmarks import layers
from benchmarks import speed_report as report
from benchmarks.convolutions import Convolution
from benchmarks.speed import OURS, Device, Measured, Row, Task, Way
from benchmarks.speed_report import Found
from flax_vae.io.files import replacing

WIDTH = 120  # columns of a line that is no table's
HEADINGS = {  # by the name of the file, in the order of the page
    "cpu_small": "Small model, CPU with AVX-512",
    "cpu_full": "Full model, 9x64, CPU with AVX-512",
    "cpu_full_17x64": "Full model, 17x64, CPU with AVX-512",
    "cpu_full_9x128": "Full model, 9x128, CPU with AVX-512",
    "layers": "Convolutions of the small model one by one, CPU with AVX-512",
    "h200": "Full model, 17x256, NVIDIA H200",
    "cpu_200_small": "Small model, earlier CPU, half the matmul rate",
    "cpu_200_full": "Full model, 9x64, earlier CPU, half the matmul rate",
    "cpu_200_full_9x128": "Full model, 9x128, earlier CPU, half the matmul rate",
}
HEAD = """
# Figures: speed and memory beside torch

Written by `python -m benchmarks.figures` from the JSON files in docs/speed, not by hand. What bounds these figures, and
which lowering is chosen where: [performance.md](performance.md).

- A row is a task on one clip: "encode, 9x64" encodes 9 frames of 64x64 pixels.
"""


def main(measurements: Path = Path("docs/speed"), out: Path = Path("docs/figures.md")) -> None:
    """Writes the page of figures.

    Args:
        measurements: folder of the JSON files and of their pictures, beside the page or below it.
        out: page to write.
    """
    found = {path.stem: path for path in sorted(measurements.glob("*.json"))}
    names = [name for name in HEADINGS if name in found] + [name for name in found if name not in HEADINGS]
    notes = report.NOTES.format(rounds="all", rates="given above each table")
    page = [HEAD.strip() + notes.rstrip()]
    for name in names:
        kept = json.loads(found[name].read_text())
        page.append(f"## {HEADINGS.get(name, name)}")
        page.extend(layer_section(kept) if "convolutions" in kept else speed_section(kept))
        page.append(links(found[name], out.parent))
    with replacing(out) as part:
        part.write_text("\n\n".join(page) + "\n")


def speed_section(kept: Measured) -> Iterator[str]:
    """Yields the paragraphs and tables of a run of `python -m benchmarks`, a group of tables a model and precision."""
    founds = [Found(row_of(values), values["flops"], values["ways"]) for values in kept["rows"]]
    ways = [way for way in get_args(Way) if any(way in found.ways for found in founds)]
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    yield fill(f"{kept['machine']}. {versions}. Matmul: {'; '.join(matmul_rates(kept['rates']))}.")
    yield f"```sh\n{command(founds, ways, kept['rates'])}\n```"
    for (preset, precision), group in itertools.groupby(founds, lambda found: (found.row.preset, found.row.precision)):
        group = list(group)
        limit = benchmark.max_rate(kept["rates"][precision])
        yield f"Speed, {preset} model, {precision}; the columns of torch say how many times as fast flax_vae is:"
        yield "\n".join([report.heading(ways), *(report.speed_line(found, ways, limit) for found in group)])
        yield "Memory of a call above the model, in MiB:"
        yield memory_table(group, ways)
        yield "Memory and compilation, beside the fastest torch of the row:"
        yield report.cost_table(group)
    yield report.verdict(founds) + report.reasons(founds)


def row_of(values: Measured) -> Row:
    """Reads a row from its JSON, which holds more than that."""
    return Row(**{field.name: values[field.name] for field in fields(Row)})


def matmul_rates(rates: Measured) -> Iterator[str]:
    """Yields the matmul rates of both frameworks, a phrase a precision."""
    for precision, rate in rates.items():
        told = ", ".join(f"{name} {rate[name] / 1e9:,.0f}" for name in (OURS, "torch"))
        yield f"{told} GFLOP/s ({precision})"


def command(founds: Sequence[Found], ways: Sequence[str], rates: Measured) -> str:
    """Returns the command that measures these rows.

    Args:
        founds: all rows of a run.
        ways: what flax_vae is compared with in any of them.
        rates: matmul rates by precision, with the device that each was measured on.
    """
    rows = [found.row for found in founds]
    device: Device = "cpu" if all(rate["device"] == "cpu" for rate in rates.values()) else "gpu"
    rounds = max(len(way.get("pairs", ())) for found in founds for way in found.ways.values())
    tasks = [task for task in get_args(Task) if any(row.task == task for row in rows)]
    options = {
        "--device": [device] if device != "cpu" else [],
        "--presets": [row.preset for row in rows],
        "--sizes": [f"{row.frames}x{row.size}" for row in rows],
        "--jobs": tasks if len(tasks) < len(get_args(Task)) else [],
        "--ways": ways if len(ways) < len(get_args(Way)) else [],
        "--precision": [] if set(rates) == set(benchmark.PRECISIONS[device]) else list(rates),
        "--rounds": [str(rounds)],
    }
    words = [" ".join([name, *dict.fromkeys(values)]) for name, values in options.items() if values]
    return fill(" ".join(["python -m benchmarks", *words]), WIDTH - 2, "  ").replace("\n", " \\\n")


def memory_table(founds: Sequence[Found], ways: Sequence[str]) -> str:
    """Returns the table of the memory that a call takes above the model, a column a way."""
    columns = ["", OURS, *ways]
    lines = [report.line(columns), f"|---|{'---:|' * (len(columns) - 1)}"]
    for found in founds:
        cells = [report.mib(found.ways.get(way, {}), "above") for way in (OURS, *ways)]
        lines.append(report.line([found.row.name, *cells]))
    return "\n".join(lines)


def layer_section(kept: Measured) -> Iterator[str]:
    """Yields the paragraphs and the table of a run of `python -m benchmarks.layers`."""
    found = [
        layers.Timed(Convolution.read(each["convolution"]), each["count"], each["seconds"])
        for each in kept["convolutions"]
    ]
    yield fill(f"{kept['machine']}.")
    options = f"--preset {kept['preset']} --size {kept['frames']}x{kept['size']} --precision {kept['precision']}"
    yield f"```sh\npython -m benchmarks.layers {options}\n```"
    yield layers.table(found, kept["gradient"])
    yield layers.NOTES.format(rounds="all").strip()


def links(path: Path, base: Path) -> str:
    """Returns a link to a file of measurements and, where it has one, to its picture; both relative to the page."""
    picture = path.with_suffix(".png")
    data = path.relative_to(base).as_posix()
    text = f"All measurements: [{data}]({data})."
    return f"{text}\n\n![{path.stem}]({picture.relative_to(base).as_posix()})" if picture.exists() else text


def fill(text: str, width: int = WIDTH, indent: str = "") -> str:
    """Wraps a paragraph; names with hyphens stay whole.

    Args:
        text: the paragraph, as one line.
        width: columns of a line at most.
        indent: what lines after the first begin with.
    """
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.figures", description=__doc__)
