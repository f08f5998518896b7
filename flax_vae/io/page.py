"""A page of words, pictures and plots, placed in inches from the top left, as a PNG."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vae.io.files import PathLike, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#1a1a1a", "#767676", "#e8e8e8"  # of words, of lesser words, of lines behind curves
TIMES = "\N{MULTIPLICATION SIGN}"


class Page:
    """A white page of some inches, on which things are placed by their top left corners."""

    def __init__(self, width: float, height: float, dpi: int = 120):
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Writes words as they are: a $ in a file name is a $."""
        style = {"size": 9, "color": INK, "va": "top", "parse_math": False} | style
        self.figure.text(x / self.width, 1 - y / self.height, words, **style)

    def heading(
        self, margin: float, title: str, subtitle: str, numbers: Iterable[tuple[str, str, str]], columns: int
    ) -> None:
        """Writes a title, what is below it, and, large, numbers: the words, the number and the colour of each."""
        self.text(margin, margin - 0.1, title, size=12, weight="bold")
        self.text(margin, margin + 0.16, subtitle, color=FAINT)
        for i, (words, number, colour) in enumerate(numbers):
            x = margin + i * (self.width - 2 * margin) / columns
            self.text(x, margin + 0.48, number, size=18, weight="bold", color=colour)
            self.text(x, margin + 0.84, words, color=FAINT)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Makes axes."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def picture(self, x: float, y: float, width: float, height: float, pixels: np.ndarray) -> None:
        """Shows a picture, (H, W, 3)."""
        axes = self.axes(x, y, width, height)
        axes.imshow(pixels, aspect="auto")
        axes.set_axis_off()

    def plot(self, x: float, y: float, width: float, height: float, title: str) -> Axes:
        """Makes axes for curves, with a title above and a light grid."""
        axes = self.axes(x, y, width, height)
        axes.tick_params(labelsize=8, colors=FAINT, length=0)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.set_title(title, loc="left", size=9, color=INK)
        return axes

    def save(self, path: PathLike) -> None:
        """Writes the page to a PNG file, which takes its name when it is complete."""
        with replacing(path) as part:
            self.figure.savefig(part, format="png")
