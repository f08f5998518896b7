"""Draws an evaluation: curves by frame and by position in the chunk, and frames to look at. Sizes are in inches."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flax_vae.io.page import FAINT, GRID, INK, TIMES, Page
from flax_vae.jobs.evaluation.scores import Evaluation, Sample, seam_text
from flax_vae.jobs.screen import counted
from flax_vae.metrics.contact_sheet import amplified
from flax_vae.metrics.seams import by_frame, by_position

BY_FRAME, BY_CLIP = "frame by frame, and the mean of the clips", "image by image, sorted"
BY_POSITION = "around the borders of chunks, in frames; dashed: the mean of the same place in all latents"
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (lower is better)"}
COLOURS = {"psnr": "#1f5fa8", "ssim": "#2c8259", "lpips": "#a8501f"}
BORDER = "#c0392b"
WIDTH, MARGIN = 13.0, 0.45
HEADING, PLOT, SPACE = 1.75, 1.9, 0.95  # heights: of title and numbers, of a curve, of the space around it
NAMES, GAP, MAX_HEIGHT, TITLES = 1.15, 0.06, 2.2, 0.45  # of pictures: row names, gaps, height, column titles
MAX_LINES = 24  # clips that are drawn one by one; of more, the middle 80 % are shaded


def draw(path: Path, evaluation: Evaluation, title: str) -> None:
    """Writes the picture of an evaluation to a PNG file."""
    is_moving = max(clip.frames for clip in evaluation.clips) > 1
    curves = [(BY_FRAME, draw_by_frame), (BY_POSITION, draw_by_position)] if is_moving else [(BY_CLIP, draw_by_clip)]
    samples = evaluation.samples
    widths = [sample.before.shape[1] / sample.before.shape[0] for sample in samples]
    room = WIDTH - 2 * MARGIN - NAMES - GAP * (len(samples) - 1)
    tall = min(room / sum(widths), MAX_HEIGHT)
    below = MARGIN + HEADING + len(curves) * (PLOT + SPACE) - 0.3
    page = Page(WIDTH, below + TITLES + 3 * (tall + GAP) + MARGIN)
    draw_heading(page, evaluation, title)
    pitch = (WIDTH - 2 * MARGIN) / len(evaluation.names)
    for row, (words, curve) in enumerate(curves):
        top = MARGIN + HEADING + row * (PLOT + SPACE)
        page.text(MARGIN, top - 0.42, words, color=FAINT)
        for i, name in enumerate(evaluation.names):  # side by side
            curve(page.plot(MARGIN + i * pitch + 0.45, top, pitch - 0.65, PLOT, LABELS[name]), evaluation, name)
    draw_samples(page, samples, below + TITLES, tall)
    page.save(path)


def draw_heading(page: Page, evaluation: Evaluation, title: str) -> None:
    """Writes the title and the numbers over all."""
    left_out = f"; {counted(len(evaluation.failed), 'clip')} left out" * bool(evaluation.failed)
    words = f"{counted(len(evaluation.clips), 'clip')}, {counted(evaluation.count)}{left_out}"
    large = list(numbers(evaluation))
    page.heading(MARGIN, shortened(title, 110), words, large, max(len(large), 4))


def numbers(evaluation: Evaluation) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the number and the colour of what is written large."""
    formats = {"psnr": "{:.2f} dB", "ssim": "{:.4f}", "lpips": "{:.4f}"}
    words = {"psnr": "PSNR, mean of the clips", "ssim": "SSIM", "lpips": "LPIPS, lower is better"}
    for name in evaluation.names:
        yield words[name], formats[name].format(evaluation.mean(name)), COLOURS[name]
    if (seam := evaluation.seam()) is not None:
        yield f"seam, dB, 0 is none; {counted(seam.borders, 'border')}", seam_text(seam), INK
    if (rfvd := evaluation.rfvd) is not None:
        yield f"rFVD of {counted(len(evaluation.windows), 'window')}", f"{rfvd:.1f}", INK


def draw_by_frame(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Draws a score over the frames of the clips, and their mean."""
    clips, colour = evaluation.frames(name), COLOURS[name]
    mean = by_frame(clips)
    marker = "o" if len(mean) < 40 else None
    if 1 < len(clips) <= MAX_LINES:
        for clip in clips:
            axes.plot(clip, color=colour, linewidth=0.7, alpha=0.3)
    elif len(clips) > MAX_LINES:
        bands = [np.quantile([clip[i] for clip in clips if i < len(clip)], [0.1, 0.9]) for i in range(len(mean))]
        axes.fill_between(range(len(mean)), *np.transpose(bands), color=colour, alpha=0.18, linewidth=0)
    axes.plot(mean, color=colour, linewidth=1.6, marker=marker, markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_by_position(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Draws a score around the border of two chunks, beside its mean at the same place in all latents."""
    chunk, factor = evaluation.chunk, evaluation.factor
    values = np.array(by_position(evaluation.frames(name), chunk), float)
    means = np.tile([mean_of(values[i::factor]) for i in range(factor)], chunk // factor)
    frames = np.arange(chunk) - chunk // 2
    for start in range(-(chunk // 2), chunk // 2 + 1, factor):
        axes.axvline(start - 0.5, color=GRID, linewidth=1.2)
    axes.axvline(-0.5, color=BORDER, linewidth=1.2)
    axes.plot(frames, means[frames], color=FAINT, linewidth=1, linestyle=(0, (3, 2)))
    axes.plot(frames, values[frames], color=COLOURS[name], linewidth=1.6, marker="o", markersize=3)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(-(chunk // 2), chunk // 2, max(factor // 2, 1)))


def draw_by_clip(axes: Axes, evaluation: Evaluation, name: str) -> None:
    """Draws a score of every clip, sorted."""
    axes.plot(sorted(clip.mean(name) for clip in evaluation.clips), "o", color=COLOURS[name], markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def mean_of(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN where there is none."""
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if known.size else math.nan


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
    """Leaves out the middle of a name that is too long."""
    length = max(length, 8)
    return name if len(name) <= length else f"{name[: length // 2]}\N{HORIZONTAL ELLIPSIS}{name[1 - length // 2 :]}"
