"""What the speed benchmark shows: two tables in Markdown, the reasons for what they lack, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import OURS, Measured, Row, best_torch, ratio, ratios, seconds

COSTS = [
    "",
    "above the model, MiB",
    "best torch",
    "process, MiB",
    "best torch",
    "compiling, s",
    "first call, s",
    "torch.compile, first call, s",
]
NOTES = """
- Ratios say how many times as fast flax_vae is: the median over {rounds} rounds of the other's time to that of flax_vae
  in the same round; above 1 flax_vae is faster. In brackets, the least and the most of any round.
- best torch: the fastest of the ways in torch, for each row by itself. plain: flax_vae traced with XLA's own 3D
  convolutions, which is what nnx.Conv would run.
- GFLOP/s: the flops that XLA counts in the plain program, without products with zeros around a clip, to the median time
  of flax_vae. of matmul: to the rate of products of large square matrices, in jax or in torch, whichever is the
  higher; in GFLOP/s: {rates}.
- gradient: of the mean squared error of encoding and decoding, by every weight. train: one step on L1 + 1e-12 KL with
  AdamW (optax with its state donated; torch.optim.AdamW, fused); weights and moments are in the precision of the row.
- above the model: the most that a call takes beyond what is held between calls: weights, inputs, AdamW's moments.
  process: the most the process has ever taken, compilation included; on a gpu, of the gpu's memory.
- compiling: tracing, lowering and compiling flax_vae, nothing cached. torch.compile compiles in its first call.
"""


@dataclass(frozen=True)
class Found:
    """A row, its flops, and what was measured of each way."""

    row: Row
    flops: float | None
    ways: Measured


def heading(ways: Sequence[str]) -> str:
    """Returns the head of the table of speed."""
    columns = ["", "seconds", "GFLOP/s", "of matmul", "best torch", *ways]
    return f"{line(columns)}\n|---|{'---:|' * (len(columns) - 1)}"


def line(cells: Sequence[str]) -> str:
    """Returns a line of a table."""
    return f"| {' | '.join(cells)} |"


def speed_line(found: Found, ways: Sequence[str], limit: float | None) -> str:
    """Returns a row of the table of speed; `limit` is the rate of matmuls in flops per second."""
    taken, best = seconds(found.ways, OURS), best_torch(found.ways)
    rate = found.flops / taken if found.flops and taken else None
    cells = [found.row.name, number(taken, ".3g"), number(rate and rate / 1e9, ",.0f")]
    cells.append(number(rate and limit and rate / limit, ".0%"))
    cells.append("-")
    if best:
        times = ratios(found.ways, best)
        cells[-1] = f"**{ratio(found.ways, best):.2f}** ({min(times):.2f} to {max(times):.2f}), {best}"
    return line([*cells, *(number(ratio(found.ways, way), ".2f") for way in ways)])


def cost_table(founds: Sequence[Found]) -> str:
    """Returns the table of memory and compilation."""
    lines = [line(COSTS), f"|---|{'---:|' * (len(COSTS) - 1)}"]
    for found in founds:
        ours, best = found.ways.get(OURS, {}), found.ways.get(best_torch(found.ways) or "", {})
        cells = [mib(each, key) for key in ("above", "process") for each in (ours, best)]
        took = ours.get("took", {})
        compiling = took["trace"] + took["compile"] if took else None
        compiled = [found.ways[way]["took"]["first"] for way in found.ways if is_compiled(found.ways, way)]
        times = compiling, took.get("first"), compiled[0] if compiled else None
        lines.append(line([found.row.name, *cells, *(number(time, ".3g") for time in times)]))
    return "\n".join(lines)


def is_compiled(ways: Measured, way: str) -> bool:
    """Whether a way in torch.compile was measured."""
    return way.startswith("compile") and "took" in ways[way]


def mib(way: Measured, key: str) -> str:
    """Writes a number of bytes of a way's memory."""
    size = way.get("memory", {}).get(key)
    return number(size and size / 2**20, ",.0f")


def number(value: float | None, form: str) -> str:
    """Writes a number, or a dash for none."""
    return "-" if value is None else format(value, form)


def reasons(founds: Sequence[Found]) -> str:
    """Lists why there are dashes in the tables."""
    failed = [(found.row, way["error"]) for found in founds for way in found.ways.values() if "error" in way]
    return "".join(f"\n- {row.preset}, {row.precision}, {row.name}: {error}" for row, error in failed)


def verdict(founds: Sequence[Found]) -> str:
    """Counts the rows in which flax_vae is at least as fast as the fastest torch."""
    best = [ratio(found.ways, way) for found in founds if (way := best_torch(found.ways))]
    ahead = sum(times is not None and times >= 1 for times in best)
    if not best:
        return "No torch was measured."
    return f"flax_vae is at least as fast as the fastest torch in {ahead} of {len(best)} rows."


def notes(rounds: int, rates: Measured) -> str:
    """Explains the tables, with the rates of matmuls by precision and framework."""
    told = [
        f"{name} {rate[name] / 1e9:,.0f} ({precision})" for precision, rate in rates.items() for name in (OURS, "torch")
    ]
    return NOTES.format(rounds=rounds, rates=", ".join(told))


def draw(founds: Sequence[Found], ways: Sequence[str], path: Path) -> None:
    """Draws how many times as fast flax_vae is, as bars from 1 on: to the right where it is faster."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Found]] = {}
    for found in founds:
        groups.setdefault(f"{found.row.preset} model, {found.row.precision}", []).append(found)
    most = max(len(group) for group in groups.values())
    figure = Figure((1.5 + 5 * len(groups), 1.5 + 0.17 * most * (len(ways) + 1)), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        draw_group(axes, group, ways)
        axes.set_title(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_group(axes: Any, group: Sequence[Found], ways: Sequence[str]) -> None:
    """Draws the rows of one model and precision from top to bottom, with a bar for each way."""
    height = 1 / (len(ways) + 1)
    for i, way in enumerate(ways):
        places = [(k + i * height, ratio(found.ways, way)) for k, found in enumerate(group)]
        bars = [(place, times) for place, times in places if times is not None]
        widths = [times - 1 for _, times in bars]
        drawn = axes.barh([place for place, _ in bars], widths, height, left=1, label=way)
        axes.bar_label(drawn, [f"{times:.2f}" for _, times in bars], padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yticks([k + (len(ways) - 1) * height / 2 for k in range(len(group))], [found.row.name for found in group])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min(axes.get_xlim()[0], 0.5), max(axes.get_xlim()[1], 2))
    axes.set_xlabel("how many times as fast flax_vae is")
    axes.grid(axis="x", alpha=0.3)
