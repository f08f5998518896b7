"""Where a model's gradient spends its time, convolution by convolution, beside torch: python -m benchmarks.layers

Each convolution of encoding and decoding a clip is computed alone, forward and both gradients, by flax_vae and by torch
in two layouts, in turns, each a process of its own. Then the gradient as a whole is. Prints a table, and writes it as
JSON and as a picture. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import tyro

from benchmarks import speed
from benchmarks.convolutions import PARTS, Convolution, Part, convolutions_of
from benchmarks.options import frames_and_pixels, usual
from benchmarks.speed import OURS, Device, Precision, Row, Worker
from benchmarks.speed_report import line
from benchmarks.subjects import Preset, machine
from flax_vae.io.files import replacing
from flax_vae.jobs.screen import note

LAYOUTS = ("eager", "channels_last_3d")
DRAWN = 16  # convolutions in the picture
NOTES = """
- Milliseconds of all convolutions of a row together, flax_vae / torch in the faster of its two layouts; medians of
  {rounds} rounds. Torch pads the clip before it convolves. The rows are sorted by what flax_vae takes more than torch.
- rest: what the gradient as a whole takes beyond its convolutions: norms, silus, attention, and what is recomputed.
  It can be negative: a large convolution by itself has pages of memory cleared that a whole program has already.
"""


@dataclass(frozen=True)
class Timed:
    """A convolution, how often the model has it, and the seconds of one by part and by way."""

    convolution: Convolution
    count: int
    seconds: dict[Part, dict[str, float]]

    def taken(self, part: Part) -> tuple[float, float]:
        """Returns the seconds of a part in all of them: of flax_vae, and of torch in its faster layout; 0 for none."""
        found = self.seconds.get(part)
        if found is None:
            return 0.0, 0.0
        return self.count * found[OURS], self.count * min(found[way] for way in LAYOUTS)

    @property
    def behind(self) -> float:
        """The seconds that flax_vae takes more than torch."""
        return sum(ours - torch for ours, torch in map(self.taken, PARTS))

    @property
    def total(self) -> float:
        """The seconds of flax_vae and of torch together."""
        return sum(ours + torch for ours, torch in map(self.taken, PARTS))


def main(
    preset: Preset = "small",
    size: str = "17x64",
    rounds: int = 5,
    device: Device = "cpu",
    precision: Annotated[Precision | None, usual("float32", "tf32")] = None,
    out: Path = Path("benchmark_results"),
) -> None:
    """Times each convolution of a model beside torch.

    Args:
        preset: model: tiny, small or full.
        size: clip: 8k + 1 frames x height and width in pixels, a multiple of 8.
        rounds: how often each is timed; the median is told.
        device: what both frameworks compute on.
        precision: of weights and of what is computed.
        out: folder for layers.json, layers.png, and workers.log.
    """
    if rounds < 1:
        raise SystemExit(f"--rounds {rounds}: expected at least 1")
    frames, pixels = frames_and_pixels(size, "--size")
    precision = precision or ("float32" if device == "cpu" else "tf32")
    row = Row(preset, precision, "gradient", frames, pixels)
    out.mkdir(parents=True, exist_ok=True)
    where = machine()
    print(f"# Convolutions of the {preset} model, {size}\n\n{where}\n", flush=True)
    with open(out / "workers.log", "wb") as log:
        try:
            found = sorted(timed(row, rounds, device, log), key=lambda each: -each.behind)
            whole = gradient_seconds(row, rounds, device, log)
        except speed.Failed as failed:
            raise SystemExit(str(failed)) from None
    print(table(found, whole) + NOTES.format(rounds=rounds))
    kept = {"machine": where, **asdict(row), "gradient": whole, "convolutions": [asdict(each) for each in found]}
    with replacing(out / "layers.json") as part:
        part.write_text(json.dumps(kept, indent=1) + "\n")
    draw(found, f"{preset} model, {precision}, {size}", out / "layers.png")


def timed(row: Row, rounds: int, device: Device, log: IO[bytes]) -> list[Timed]:
    """Times each convolution of a model once, with how often the model has it."""
    counts = Counter(convolutions_of(row.preset, row.frames, row.size))
    request = {
        "kind": "convolutions",
        "convolutions": [asdict(convolution) for convolution in counts],
        "precision": row.precision,
    }
    found = []
    with ExitStack() as stack:
        workers = {
            way: stack.enter_context(closing(speed.worker(way, request, device, log))) for way in (OURS, *LAYOUTS)
        }
        for index, (convolution, count) in enumerate(counts.items()):
            note(f"[{index + 1}/{len(counts)}] {convolution.name}")
            seconds: dict[Part, dict[str, float]] = {
                part: part_seconds(workers, [index, part], rounds) for part in convolution.parts
            }
            found.append(Timed(convolution, count, seconds))
    return found


def part_seconds(workers: dict[str, Worker], asked: list[Any], rounds: int) -> dict[str, float]:
    """Returns the median seconds of a part by way; the first call, which compiles, does not count."""
    for worker in workers.values():
        worker.go(asked)
    times = [{way: worker.go(asked) for way, worker in workers.items()} for _ in range(rounds)]
    return {way: statistics.median(round[way] for round in times) for way in workers}


def gradient_seconds(row: Row, rounds: int, device: Device, log: IO[bytes]) -> dict[str, float]:
    """Returns the median seconds of the gradient as a whole by way."""
    note("the gradient as a whole")

    def start(way: str) -> Worker:
        return speed.worker(way, {"kind": "task", "row": asdict(row), "free": None}, device, log)

    results = speed.compared(LAYOUTS, rounds, start, note)
    errors = [result["error"] for result in results.values() if "error" in result]
    if errors:
        raise speed.Failed(errors[0])
    return {way: seconds for way in results if (seconds := speed.seconds(results, way)) is not None}


def table(found: Sequence[Timed], whole: dict[str, float]) -> str:
    """Returns a row for each convolution, their sum, and what the gradient as a whole takes beside it."""
    columns = ["", "count", *PARTS, "behind"]
    lines = [line(columns), f"|---|{'---:|' * (len(columns) - 1)}"]
    for each in found:
        cells = [both(each.taken(part)) if part in each.seconds else "-" for part in PARTS]
        lines.append(line([each.convolution.name, str(each.count), *cells, f"{1000 * each.behind:+,.0f}"]))
    sums = [[sum(times) for times in zip(*(each.taken(part) for each in found), strict=True)] for part in PARTS]
    ours, torch = (sum(times) for times in zip(*sums, strict=True))
    count = sum(each.count for each in found)
    lines.append(line(["all", str(count), *map(both, sums), f"{1000 * (ours - torch):+,.0f}"]))
    theirs = min(whole[way] for way in LAYOUTS)
    rest = both((whole[OURS] - ours, theirs - torch))
    lines += ["", f"all convolutions: {both((ours, torch))} ms; rest: {rest} ms; "]
    return "\n".join(lines) + f"the gradient as a whole: {both((whole[OURS], theirs))} ms"


def both(seconds: Sequence[float]) -> str:
    """Writes the times of flax_vae and of torch in milliseconds."""
    return " / ".join(f"{1000 * each:,.3g}" if each < 1 else f"{1000 * each:,.0f}" for each in seconds)


def draw(found: Sequence[Timed], title: str, path: Path) -> None:
    """Draws for each of the longest convolutions a bar of flax_vae above one of torch, of three parts."""
    from matplotlib.figure import Figure

    least = sorted(each.total for each in found)[-DRAWN:][0]
    found = [each for each in found if each.total >= least]
    figure = Figure((9, 1.5 + 0.45 * len(found)), layout="constrained")
    axes = figure.subplots()
    colors = ("tab:blue", "tab:orange", "tab:green")
    for place, (framework, hatch) in enumerate((("flax_vae", None), ("torch", "///"))):
        left = [0.0] * len(found)
        for part, color in zip(PARTS, colors, strict=True):
            widths = [1000 * each.taken(part)[place] for each in found]
            rows = [row + 0.4 * place for row in range(len(found))]
            label = f"{framework}, {part}"
            axes.barh(rows, widths, 0.36, left, color=color, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    names = [f"{each.count} of {each.convolution.name}" for each in found]
    axes.set_yticks([row + 0.2 for row in range(len(found))], names, fontsize=8)
    axes.set_ylim(len(found), -0.5)
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.layers", description=__doc__)
