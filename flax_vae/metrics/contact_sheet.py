"""A contact sheet: frames of a clip, their reconstruction, and the difference. T frames, H W pixels, always RGB."""

import math
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from flax_vae.io.files import PathLike
from flax_vae.io.page import FAINT, TIMES, Page
from flax_vae.io.pixels import to_uint8
from flax_vae.metrics.psnr import psnr

MAX_AREA, MAX_WIDTH = 36, 15  # of all pictures: square inches, inches of width
GAP, MARGIN, LABEL = 0.06, 0.3, 1.2  # inches
DPI = 150


def contact_sheet(
    path: PathLike,
    inputs: ArrayLike,
    outputs: ArrayLike,
    title: str | None = None,
    numbers: Sequence[int] | None = None,
    quality: float | None = None,
    columns: int = 6,
) -> None:
    """Writes a PNG of evenly chosen frames: input, reconstruction, their difference (absolute, times a factor), PSNR.

    One or two upright frames stand side by side, others in three rows.

    Args:
      inputs, outputs: (T, H, W, 3), uint8 or floats in [-1, 1].
      title: a heading.
      numbers: those of the frames in their clip, where they are samples of it.
      quality: PSNR of the whole clip in dB, to print in place of that of these frames.
      columns: number of frames at most.

    Raises:
      ValueError: another suffix, shapes or numbers that do not fit.
    """
    if not str(path).lower().endswith(".png"):
        raise ValueError(f"{path}: a contact sheet is a PNG; end the name in .png")
    if columns < 1:
        raise ValueError(f"columns={columns}: expected 1 or more")
    a, b = (x if x.dtype == np.uint8 else to_uint8(x) for x in map(np.asarray, (inputs, outputs)))
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or not a.size:
        raise ValueError(f"got frames {a.shape} and {b.shape}, expected (T, H, W, 3) twice")
    if numbers is not None and len(numbers) != len(a):
        raise ValueError(f"got {len(numbers)} numbers for {len(a)} frames, expected one for each")
    frames, height, width, _ = a.shape
    shown = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    difference, factor = amplified(zip(a[shown], b[shown], strict=True))
    kinds = ["input", "reconstruction", f"difference {TIMES}{factor}"]
    names = [f"frame {i if numbers is None else numbers[i]}\n{_decibels(psnr(a[i], b[i]))}" for i in shown]
    count = f"{len(shown)} of {frames} frames" if numbers is None else f"frames from {numbers[0]} to {numbers[-1]}"
    overall = f"{_decibels(psnr(a, b))} over all" if quality is None else f"{_decibels(quality)} over the whole clip"
    subtitle = f"{count}, {width} {TIMES} {height}, PSNR {overall}"
    grid = np.stack([a[shown], b[shown], difference])
    if len(shown) < 3 and len(shown) * width < 1.5 * height:
        _draw(path, grid.swapaxes(0, 1), names, kinds, title, subtitle)
    else:
        _draw(path, grid, kinds, names, title, subtitle)


def _draw(path, grid, row_names, column_names, title, subtitle):
    """Draws a grid of pictures (rows, columns, H, W, 3) in inches, so that margins stay at any aspect ratio."""
    rows, columns, height, width, _ = grid.shape
    cell_width = min(math.sqrt(MAX_AREA / (rows * columns) * width / height), MAX_WIDTH / columns)
    cell_height = cell_width * height / width
    across, down = max(cell_width + GAP, 1), max(cell_height + GAP, 0.36)  # cells, with room for the names
    page_width = max(MARGIN + LABEL + columns * across + MARGIN, 6)
    heading = textwrap.wrap(title or "", int(9 * (page_width - 2 * MARGIN)))
    top = MARGIN + 0.24 * len(heading) + 0.3 + 0.22 * (1 + column_names[0].count("\n"))
    page = Page(page_width, top + rows * down + MARGIN, DPI)
    page.text(MARGIN, MARGIN, "\n".join(heading), size=12, weight="bold")
    page.text(MARGIN, MARGIN + 0.24 * len(heading), subtitle, color=FAINT)
    for row in range(rows):
        y = top + row * down
        page.text(MARGIN, y + cell_height / 2, row_names[row], va="center")
        for column in range(columns):
            x = MARGIN + LABEL + column * across + (across - cell_width) / 2
            if row == 0:
                page.text(x + cell_width / 2, y - 0.06, column_names[column], ha="center", va="bottom")
            page.picture(x, y, cell_width, cell_height, grid[row, column])
    page.save(path)


def amplified(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], int]:
    """Returns the absolute differences of pairs of uint8 pictures, times a factor that makes them visible; and it."""
    differences = [np.abs(a.astype(np.int16) - b) for a, b in pairs]
    highest = np.quantile(np.concatenate([difference.ravel() for difference in differences]), 0.995)
    factor = next((factor for factor in (32, 16, 8, 4, 2) if factor * highest <= 255), 1)
    return [np.minimum(difference * factor, 255).astype(np.uint8) for difference in differences], factor


def _decibels(value):
    return "\N{INFINITY} dB" if math.isinf(value) else f"{value:.2f} dB"
