"""Curves of a training run by step: every value a faint point, their running median a line."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from flax_vae.train.history import History

BLUE, GREEN, RUST, PURPLE, GREY = "#1f5fa8", "#2c8259", "#a8501f", "#6b4a9c", "#5c6670"
BATCH_COLOUR, SHOWN_COLOUR, SKIPPED_COLOUR = BLUE, RUST, "#c0392b"
MAX_POINTS, EXTREMES = 1500, 20  # points of a curve: evenly spaced ones, and the least and greatest beyond these
MAX_MEDIANS, WINDOWS = 200, 40  # points of a line; windows that would cover the curve, each of half the median's width
LOG_RATIO = 5  # of the greatest to the least value, from which on a scale is logarithmic


@dataclass(frozen=True)
class Panel:
    """A plot of columns of the metrics, each with its label and colour; `may_be_log` allows a logarithmic scale."""

    title: str
    curves: tuple[tuple[str, str, str], ...]
    may_be_log: bool = False
    bottom: float | None = None
    top: float | None = None
    cells: int = 1


REGULARIZERS = ("r1", "R1", GREEN), ("lecam", "LeCam", GREEN)
PANELS = (
    Panel("PSNR, dB", (("psnr", "training batches", BATCH_COLOUR),), cells=2),
    Panel("reconstruction", (("mse", "MSE", BLUE), ("l1", "L1", GREEN), ("lpips", "LPIPS", RUST)), may_be_log=True),
    Panel("KL", (("kl", "", PURPLE),), may_be_log=True),
    Panel("GAN losses", (("gan", "VAE", BLUE), ("discriminator", "discriminator", RUST), *REGULARIZERS)),
    Panel("logits", (("logits_real", "clips", GREEN), ("logits_fake", "reconstructions", RUST))),
    Panel("weight of the GAN", (("gan_weight", "", PURPLE),), may_be_log=True),
    Panel("gradient norm, discriminator", (("discriminator_gradient_norm", "", RUST),), may_be_log=True),
    Panel("gradient norm", (("gradient_norm", "", BLUE),), may_be_log=True),
    Panel("learning rate", (("learning_rate", "", GREEN),), bottom=0),
    Panel("frames per second", (("frames_per_second", "", GREY),), bottom=0),
    Panel("time spent waiting for data", (("waited", "", GREY),), bottom=0, top=1),
)


def panels_with_data(history: History) -> list[Panel]:
    """Returns the panels that have something to show."""
    there = {name for name, values in history.metrics.items() if np.isfinite(values).any()}
    there |= {"psnr"} if history.snapshots else set()
    return [panel for panel in PANELS if there & {name for name, _, _ in panel.curves}]


def draw_panel(axes: Axes, panel: Panel, history: History) -> None:
    """Draws the curves of a panel, with the PSNR the snapshots' too, and a mark for every skipped step."""
    lines, points = [], []
    for name, label, colour in panel.curves:
        values = history.metrics.get(name, np.zeros(0))
        if np.isfinite(values).any():
            points.append(values)
            lines.append(draw_curve(axes, history.steps, values, label, colour))
    if panel.curves[0][0] == "psnr" and history.snapshots:
        steps, shown = zip(*((snapshot.step, snapshot.psnr) for snapshot in history.snapshots), strict=True)
        axes.plot(steps, shown, color=SHOWN_COLOUR, linewidth=1.6, marker="o", markersize=3.5, label="clips above")
        lines.append(np.array(shown))
    scale_values(axes, panel, np.concatenate(lines), np.concatenate([*points, *lines]))
    scale_steps(axes, panel, history)
    label_curves(axes)


def draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> np.ndarray:
    """Draws a column as points and its running median, which is returned."""
    chosen = subsampled(values)
    sparse = 1 / math.sqrt(len(chosen))
    style: dict[str, Any] = {"alpha": np.clip(8 * sparse, 0.25, 0.6), "markersize": np.clip(30 * sparse, 1.3, 4)}
    axes.plot(steps[chosen], values[chosen], "o", color=colour, markeredgewidth=0, **style)
    indices, line = running_median(values)
    axes.plot(steps[indices], line, color=colour, linewidth=1.6, label=label)
    return line


def subsampled(values: np.ndarray) -> np.ndarray:
    """Returns the indices of the finite values; of many, evenly spaced ones, and those of the least and greatest."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= MAX_POINTS:
        return finite
    by_size = finite[np.argsort(values[finite])]
    return np.union1d(finite[:: len(finite) // MAX_POINTS], [*by_size[:EXTREMES], *by_size[-EXTREMES:]])


def running_median(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices, and the median of the finite values around each."""
    finite = np.flatnonzero(np.isfinite(values))
    reach = len(finite) // WINDOWS
    centres = np.unique(np.linspace(0, len(finite) - 1, min(MAX_MEDIANS, len(finite))).round().astype(int))
    ends = centres + np.minimum(centres + reach // 10, reach) + 1  # narrower at the start, where values fall fast
    windows = [finite[max(centre - reach, 0) : end] for centre, end in zip(centres, ends, strict=True)]
    return finite[centres], np.array([np.median(values[window]) for window in windows])


def scale_values(axes: Axes, panel: Panel, line: np.ndarray, points: np.ndarray) -> None:
    """Sets scale, limits and ticks, such that outliers among the points do not flatten the line."""
    line, points = (values[np.isfinite(values)] for values in (line, points))
    if panel.may_be_log and needs_log(points):
        low, high = limits(*(np.log10(values[values > 0]) for values in (line, points)), least=1)
        axes.set_yscale("log")
        axes.set_ylim(10**low, 10**high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high - low > 2 else (1.0, 2.0, 5.0), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    elif line.size:
        low, high = limits(line, points, least=0.05 * abs(line).max())
        axes.set_ylim(low if panel.bottom is None else panel.bottom, high if panel.top is None else panel.top)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1) if panel.top == 1 else FuncFormatter(lambda y, _: f"{y:,g}"))


def needs_log(points: np.ndarray) -> bool:
    """Whether values span a wide range, all of it above zero."""
    low, high = np.quantile(points[points > 0], [0.01, 0.99]) if (points > 0).any() else (1, 1)
    return high / low > LOG_RATIO and bool((points >= 0).all())


def limits(line: np.ndarray, points: np.ndarray, least: float) -> tuple[float, float]:
    """Returns the limits of an axis, `least` apart or more: the line, the points except outliers, and a margin."""
    most = [*np.quantile(points, [0.02, 0.98]), *line]
    low, high = min(most), max(most)
    reach = max(high - low, least) / 2 or 1.0
    low, high = max(points.min(), low - reach), min(points.max(), high + reach)
    room = 0.06 * max(high - low, 0.2 * reach)
    return low - room, high + room


def scale_steps(axes: Axes, panel: Panel, history: History) -> None:
    """Has all panels begin at 0 and end at the last step, and marks skipped steps."""
    last = max([1, *history.steps[-1:], *(snapshot.step for snapshot in history.snapshots)])
    axes.set_xlim(-0.015 * last, 1.015 * last)
    axes.xaxis.set_major_locator(MaxNLocator(4 * panel.cells, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.vlines(history.skipped, 0, 0.05, color=SKIPPED_COLOUR, linewidth=0.8, transform=axes.get_xaxis_transform())


def label_curves(axes: Axes) -> None:
    """Adds the labels of curves, in their colours."""
    if not axes.get_legend_handles_labels()[1]:
        return
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "handlelength": 0, "handletextpad": 0, "columnspacing": 1}
    corner: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 4}
    for handle in axes.legend(labelcolor="linecolor", **style, **corner).legend_handles:
        if handle is not None:
            handle.set_visible(False)
