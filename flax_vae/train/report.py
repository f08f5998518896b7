"""The report of a training run as a picture: numbers, snapshots through training, curves. Sizes are in inches."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flax_vae.io.page import FAINT, INK, TIMES, Page
from flax_vae.train import curves
from flax_vae.train.history import History, Snapshot, read_history

WIDTH, MARGIN = 13.0, 0.45
HEADING, PLOT, PLOT_SPACE = 1.45, 1.7, 0.75  # heights: of title and numbers, of a plot, of the space around it
TITLE, NAMES, GAP, MAX_FRAME = 0.3, 0.75, 0.06, 2.2  # heights of a strip: above, below and between frames, of a frame
MAX_SNAPSHOTS, MAX_CLIPS, COLUMNS = 6, 3, 4  # columns and rows of a strip; plots side by side


def write_report(folder: Path) -> Path:
    """Draws the report of the run in `folder`, finished or not, into its report.png; returns that path."""
    history = read_history(folder)
    strip, rows = Strip(history.snapshots), in_rows(curves.panels_with_data(history))
    top = MARGIN + HEADING + strip.height
    page = Page(WIDTH, top + len(rows) * (PLOT + PLOT_SPACE))
    page.heading(MARGIN, title(history), "; ".join(settings(history)), numbers(history), 5)
    strip.draw(page, MARGIN + HEADING)
    pitch = (WIDTH - 2 * MARGIN + 0.2) / COLUMNS
    for row in rows:
        left = MARGIN
        for panel in row:
            width = panel.cells * pitch
            curves.draw_panel(page.plot(left + 0.42, top, width - 0.62, PLOT, panel.title), panel, history)
            left += width
        top += PLOT + PLOT_SPACE
    path = folder / "report.png"
    page.save(path)
    return path


def in_rows(panels: Sequence[curves.Panel]) -> list[list[curves.Panel]]:
    """Breaks panels into rows, as words into lines."""
    rows: list[list[curves.Panel]] = []
    for panel in panels:
        if not rows or sum(other.cells for other in rows[-1]) + panel.cells > COLUMNS:
            rows.append([])
        rows[-1].append(panel)
    return rows


class Strip:
    """Frames of the shown clips, a row a clip: the input, then its reconstruction in one snapshot after another."""

    def __init__(self, snapshots: Sequence[Snapshot]):
        self.snapshots, self.height = spread_out(snapshots, MAX_SNAPSHOTS), 0.0
        if not self.snapshots:
            return
        self.inputs, self.outputs = zip(*(snapshot.read() for snapshot in self.snapshots), strict=True)
        high, wide = self.inputs[-1].shape[1:3]
        room = WIDTH - 2 * MARGIN - GAP * len(self.snapshots)
        self.size = min(room / (1 + len(self.snapshots)) * high / wide, MAX_FRAME), wide / high
        self.height = TITLE + min(len(self.inputs[-1]), MAX_CLIPS) * (self.size[0] + GAP) + NAMES

    def draw(self, page: Page, top: float) -> None:
        """Draws the frames from `top` on, with step and PSNR under each column."""
        if not self.snapshots:
            return
        page.text(MARGIN, top, "reconstruction through training, by the averaged weights", color=FAINT)
        names = ["input", *(f"step {one.step:,}\n{one.psnr:.2f} dB" for one in self.snapshots)]
        high, wide = self.size[0], self.size[0] * self.size[1]
        for column, (name, frames) in enumerate(zip(names, (self.inputs[-1], *self.outputs), strict=True)):
            x, y = MARGIN + column * (wide + GAP), top + TITLE
            for pixels in frames[:MAX_CLIPS]:
                page.picture(x, y, wide, high, pixels)
                y += high + GAP
            page.text(x, y, name, linespacing=1.3)


def spread_out(snapshots: Sequence[Snapshot], count: int) -> list[Snapshot]:
    """Picks `count` snapshots, spaced evenly by the logarithm of their steps, the first and the last among them."""
    if len(snapshots) <= count:
        return list(snapshots)
    left = list(snapshots[1:])
    for step in np.geomspace(snapshots[1].step, snapshots[-1].step, count - 1):
        left.remove(min(left, key=lambda one: abs(np.log(one.step / step))))
    return [one for one in snapshots if one not in left]


def title(history: History) -> str:
    """Returns the names of the model and of the data."""
    config = history.config
    if "model" not in config:
        return f"training in {history.name}"
    start = f" from {Path(config['init']).name}" if config.get("init") else ""
    source = f", trained on {Path(config['source']).name}" if "source" in config else ""
    words = f"{config['model']} model{start}{source}"
    return words if len(words) < 110 else f"{words[:109]}\N{HORIZONTAL ELLIPSIS}"


def settings(history: History) -> Iterator[str]:
    """Yields how far the run is, and its main settings."""
    config, done = history.config, int(history.steps[-1]) + 1 if len(history.steps) else 0
    clips, gan = config.get("clips", {}), config.get("gan", {})
    yield f"{done:,} of {config['steps']:,} steps" if config.get("steps", done) != done else f"{done:,} steps"
    if {"batch", "frames", "size"} <= clips.keys() and clips.get("images") != 1:
        yield f"{clips['batch']} clips of {clips['frames']} frames, {clips['size']} {TIMES} {clips['size']}"
    if clips.get("images") and "image_batch" in clips:
        yield f"{clips['images']:.0%} of the batches are {clips['image_batch']} images"
    if gan.get("kind", "none") != "none":
        yield f"GAN on {gan['kind']} from step {gan.get('start', 0):,}"
    yield from (f"{name} {config[name]}".removeprefix("precision ") for name in ("precision", "seed") if name in config)


def numbers(history: History) -> Iterator[tuple[str, str, str]]:
    """Yields (label, number, colour) of the large numbers."""
    there = {name: finite for name, values in history.metrics.items() if (finite := values[np.isfinite(values)]).size}
    if history.snapshots:
        yield "PSNR of the clips below", f"{history.snapshots[-1].psnr:.2f} dB", curves.SHOWN_COLOUR
    if "psnr" in there:
        yield "PSNR of training batches", f"{curves.running_median(there['psnr'])[1][-1]:.2f} dB", curves.BATCH_COLOUR
    if "frames_per_second" in there:
        yield "frames per second, median", f"{np.median(there['frames_per_second']):,.3g}", INK
    if "seconds" in there:
        yield "training", duration(there["seconds"].sum()), INK
    if len(history.skipped):
        yield "not finite and skipped, marked red", f"{len(history.skipped):,}", curves.SKIPPED_COLOUR


def duration(seconds: float) -> str:
    """Formats seconds as "3 h 12 min", "12 min" or "12 s"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
