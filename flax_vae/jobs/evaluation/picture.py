"""Draws an evaluation: curves by frame and by position in the chunk, and frames to look at. Sizes are in inches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.io.page import FAINT, GRID, INK, TIMES, Page
from flax_vae.jobs.evaluation.scores import Evaluation, Sample
from flax_vae.metrics.contact_sheet import amplified
from flax_vae.metrics.seams import by_frame, by_position

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BY_FRAME, BY_CLIP = "frame by frame, and the mean of the clips", "image by image, sorted"
BY_POSITION = "around the borders of chunks, in frames; dashed: the mean of the same place in all latents"
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (lower is better)"}
COLOURS = {"psnr": "#1f5fa8", "ssim": "#2c8259", "lpips": "#a8501f"}
BORDER = "#c0392b"
WIDTH, MARGIN = 13.0, 0.45
HEADING, PLOT, SPACE = 1.75, 1.9, 0.95  # heights: of title and numbers, of a curve, of what is around it
NAMES, GAP, TALLEST, TITLES = 1.15, 0.06, 2.2, 0.45  # of the pictures: names of rows, gaps, height, titles of columns
LINES = 24  # clips that are drawn one by one; of more, the middle 80 % are shaded


def draw(path: Path, evaluation: Evaluation, title: str) -> None:
    """Writes the picture of an evaluation, a PNG."""
    is_moving = max(clip.frames for clip in evaluation.clips) > 1
    curves = [(BY_FRAME, draw_by_frame), (BY_POSITION, draw_by_position)] if is_moving else [(BY_CLIP, draw_by_clip)]
    samples = evaluation.samples
    widths = [sample.before.shape[1] / sample.before.shape[0] for sample in samples]
    room = WIDTH - 2 * MARGIN - NAMES - GAP * (len(samples) - 1)
    tall = min(room / sum(widths), TALLEST)
    below = MARGIN + HEADING + len(curves) * (PLOT + SPACE) - 0.3
    page = Page(WIDTH, below + TITLES + 3 * (tall + GAP) + MARGIN)
    draw_heading(page, evaluation, title)
    for row, (words, curve) in enumerate(curves):
        top = MARGIN + HEADING + row * (PLOT + SPACE)
        page.text(MARGIN, top - 0.42, words, color=FAINT)
        for axes, name in zip(panels(page, top, evaluation.names), evaluation.names, strict=True):
            curve(axes, evaluation, name)
    draw_samples(page, samples, below + TITLES, tall)
    page.save(path)


def panels(page: Page, y: float, names: Sequence[str]) -> Iterator[Axes]:
    """Yields axes for curves side by side, one for each score."""
    pitch = (WIDTH - 2 * MARGIN) / len(names)
    for i, name in enumerate(names):
        yield page.plot(MARGIN + i * pitch + 0.45, y, pitch - 0.65, PLOT, LABELS[name])


def draw_heading(page: Page, evaluation: Evaluation, title: str) -> None:
    """Writes the title and the numbers over all."""
    left_out = f"; {counted(len(evaluation.failed), 'clip')} left out" * bool(evaluation.failed)
    words = f"{counted(len(evaluation.clips), 'clip')}, {counted(evaluation.count, 'frame')}{left_out}"
    large = list(numbers(evaluation))
    page.heading(MARGIN, shortened(title, 110), words, large, max(len(large), 4))


def numbers(evaluation: Evaluation) -> Iterator[tuple[str, str, str]]:
    """Yields what is written large: its name, the number, its colour."""
    formats = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "lpips": "{:.4f}"}
    words = {"psnr": "PSNR, mean of the clips", "ssim": "SSIM", "lpips": "LPIPS, lower is better"}
    for name in evaluation.names:
        yield words[name], formats[name].format(evaluation.mean(name)), COLOURS[name]
    if (seam := evaluation.seam) is not None:
        spread = f" \N{PLUS-MINUS SIGN} {seam.error:.2f}" if seam.error is not None else ""
        yield f"seam, dB, 0 is none; {counted(seam.borders, 'border')}", f"{seam.score:+.2f}{spread}", INK
    if (rfvd := evaluation.rfvd) is not None:
        yield f"rFVD of {counted(len(evaluation.windows), 'window')}", f"{rfvd:.1f}", INK


def counted(number: int, unit: str) -> str:
    """Gives "1 clip", "2 clips"."""
    return f"{number:,} {unit}" + "s" * (number != 1)


def draw_by_frame(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Draws a score over the frames of the clips, and their mean."""
    clips, colour = evaluation.frames(name), COLOURS[name]
    mean = by_frame(clips)
    marker = "o" if len(mean) < 40 else None
    if 1 < len(clips) <= LINES:
        for clip in clips:
            axes.plot(clip, color=colour, linewidth=0.7, alpha=0.3)
    elif len(clips) > LINES:
        spread = [np.quantile([clip[i] for clip in clips if i < len(clip)], [0.1, 0.9]) for i in range(len(mean))]
        axes.fill_between(range(len(mean)), *np.transpose(spread), color=colour, alpha=0.18, linewidth=0)
    axes.plot(mean, color=colour, linewidth=1.6, marker=marker, markersize=2.5)
    in_whole_numbers(axes)


def draw_by_position(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Draws a score around the border of two chunks, beside what frames at the same place in all latents have."""
    chunk, factor = evaluation.chunk, evaluation.factor
    values = np.array(by_position(evaluation.frames(name), chunk), float)
    usual = np.tile([mean_of(values[i::factor]) for i in range(factor)], chunk // factor)
    places = np.arange(chunk) - chunk // 2
    for start in range(-(chunk // 2), chunk // 2 + 1, factor):
        axes.axvline(start - 0.5, color=GRID, linewidth=1.2)
    axes.axvline(-0.5, color=BORDER, linewidth=1.2)
    axes.plot(places, usual[places], color=FAINT, linewidth=1, linestyle=(0, (3, 2)))
    axes.plot(places, values[places], color=COLOURS[name], linewidth=1.6, marker="o", markersize=3)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(-(chunk // 2), chunk // 2, max(factor // 2, 1)))


def draw_by_clip(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Draws a score of every clip, sorted."""
    axes.plot(sorted(clip.mean(name) for clip in evaluation.clips), "o", color=COLOURS[name], markersize=3)
    in_whole_numbers(axes)


def in_whole_numbers(axes: Axes) -> None:
    """Has no ticks between frames."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def mean_of(values: np.ndarray) -> float:
    """Gives the mean of what is there, NaN of nothing."""
    return float(np.mean(there)) if (there := values[~np.isnan(values)]).size else math.nan


def draw_samples(page: Page, samples: Sequence[Sample], top: float, tall: float) -> None:
    """Draws frames in columns of one height: input, reconstruction and their difference."""
    differences, factor = amplified((sample.before, sample.after) for sample in samples)
    for row, name in enumerate(("input", "reconstruction", f"difference {TIMES}{factor}")):
        page.text(MARGIN, top + row * (tall + GAP) + tall / 2, name, va="center")
    left, worst = MARGIN + NAMES, min(samples, key=lambda sample: sample.psnr)
    for sample, difference in zip(samples, differences, strict=True):
        width = tall * sample.before.shape[1] / sample.before.shape[0]
        words = f"{shortened(sample.path.name, int(width * 15))}\nframe {sample.number}\n{sample.psnr:.2f} dB"
        page.text(left, top - 0.06, words + ", worst" * (sample is worst), va="bottom", size=8, linespacing=1.3)
        for row, picture in enumerate((sample.before, sample.after, difference)):
            page.picture(left, top + row * (tall + GAP), width, tall, picture)
        left += width + GAP


def shortened(name: str, length: int) -> str:
    """Leaves the middle of a name out where it is too long."""
    length = max(length, 8)
    return name if len(name) <= length else f"{name[: length // 2]}\N{HORIZONTAL ELLIPSIS}{name[1 - length // 2 :]}"
