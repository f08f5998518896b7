"""The report of a training run: numbers, the reconstruction through training, curves. Sizes are in inches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flax_vae.io.page import FAINT, INK, TIMES, Page
from flax_vae.train.curves import MARKED, SHOWN, TRAINED, Panel, draw_panel, panels_with_data, smoothed
from flax_vae.train.history import History, Kept, read_history

WIDTH, MARGIN = 13.0, 0.45
HEADING, PLOT, SPACE = 1.45, 1.7, 0.75  # heights: of title and numbers, of a curve, of what is around it
TITLE, NAMES, GAP, TALLEST = 0.3, 0.75, 0.06, 2.2  # of pictures: heights above and below, between, of one at most
MOMENTS, ROWS, COLUMNS = 6, 3, 4  # steps and clips that are shown at most; panels side by side


def write_report(folder: Path) -> Path:
    """Draws the curves and pictures of the run in `folder`, finished or not, into its report.png; returns that path."""
    path = folder / "report.png"
    draw(path, read_history(folder))
    return path


def draw(path: Path, history: History) -> None:
    """Writes the report of a run, a PNG."""
    strip, rows = Strip(history.kept), in_rows(panels_with_data(history))
    top = MARGIN + HEADING + strip.height
    page = Page(WIDTH, top + len(rows) * (PLOT + SPACE))
    draw_heading(page, history)
    strip.draw(page, MARGIN + HEADING)
    pitch = (WIDTH - 2 * MARGIN + 0.2) / COLUMNS
    for row in rows:
        left = MARGIN
        for panel in row:
            width = panel.cells * pitch
            draw_panel(page.plot(left + 0.42, top, width - 0.62, PLOT, panel.title), panel, history)
            left += width
        top += PLOT + SPACE
    page.save(path)


def in_rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Breaks panels into rows as words into lines."""
    rows: list[list[Panel]] = []
    for panel in panels:
        if not rows or sum(other.cells for other in rows[-1]) + panel.cells > COLUMNS:
            rows.append([])
        rows[-1].append(panel)
    return rows


class Strip:
    """Frames of the shown clips, a row a clip: the input, then its reconstruction after ever more steps."""

    def __init__(self, kept: Sequence[Kept]):
        self.kept, self.height = spread_out(kept, MOMENTS), 0.0
        if not self.kept:
            return
        self.inputs, self.outputs = zip(*(one.read() for one in self.kept), strict=True)
        high, wide = self.inputs[-1].shape[1:3]
        room = WIDTH - 2 * MARGIN - GAP * len(self.kept)
        self.size = min(room / (1 + len(self.kept)) * high / wide, TALLEST), wide / high
        self.height = TITLE + min(len(self.inputs[-1]), ROWS) * (self.size[0] + GAP) + NAMES

    def draw(self, page: Page, top: float) -> None:
        """Draws the frames from `top` on, with step and PSNR under each."""
        if not self.kept:
            return
        page.text(MARGIN, top, "reconstruction through training, by the averaged weights", color=FAINT)
        names = ["input", *(f"step {one.step:,}\n{one.psnr:.2f} dB" for one in self.kept)]
        high, wide = self.size[0], self.size[0] * self.size[1]
        for column, (words, pictures) in enumerate(zip(names, (self.inputs[-1], *self.outputs), strict=True)):
            x, y = MARGIN + column * (wide + GAP), top + TITLE
            for pixels in pictures[:ROWS]:
                page.picture(x, y, wide, high, pixels)
                y += high + GAP
            page.text(x, y, words, linespacing=1.3)


def spread_out(kept: Sequence[Kept], count: int) -> list[Kept]:
    """Picks steps from the first to the last, the later the wider apart, as pictures change ever less."""
    if len(kept) <= count:
        return list(kept)
    left = list(kept[1:])
    for step in np.geomspace(kept[1].step, kept[-1].step, count - 1):
        left.remove(min(left, key=lambda one: abs(np.log(one.step / step))))
    return [one for one in kept if one not in left]


def draw_heading(page: Page, history: History) -> None:
    """Writes the title and the numbers over all."""
    page.heading(MARGIN, title(history), "; ".join(settings(history)), numbers(history), 5)


def title(history: History) -> str:
    """Names the model and the data."""
    config = history.config
    if "model" not in config:
        return f"training in {history.name}"
    start = f" from {Path(config['init']).name}" if config.get("init") else ""
    source = f", trained on {Path(config['source']).name}" if "source" in config else ""
    words = f"{config['model']} model{start}{source}"
    return words if len(words) < 110 else f"{words[:109]}\N{HORIZONTAL ELLIPSIS}"


def settings(history: History) -> Iterator[str]:
    """Yields how far the run is, and what decides it."""
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
    """Yields what is written large: its name, the number, its colour."""
    there = {name: finite for name, values in history.metrics.items() if (finite := values[np.isfinite(values)]).size}
    if history.kept:
        yield "PSNR of the clips below", f"{history.kept[-1].psnr:.2f} dB", SHOWN
    if "psnr" in there:
        yield "PSNR of training batches", f"{smoothed(there['psnr'])[1][-1]:.2f} dB", TRAINED
    if "frames_per_second" in there:
        yield "frames per second, median", f"{np.median(there['frames_per_second']):,.3g}", INK
    if "seconds" in there:
        yield "training", duration(there["seconds"].sum()), INK
    if len(history.skipped):
        yield "not finite and skipped, marked red", f"{len(history.skipped):,}", MARKED


def duration(seconds: float) -> str:
    """Gives "3 h 12 min", "12 min" or "12 s"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
