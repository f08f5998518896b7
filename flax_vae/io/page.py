"""A page of text, pictures and plots, placed in inches from the top left, as a PNG."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_vae.io.files import PathLike, replacing

INK, FAINT, GRID = "#1a1a1a", "#767676", "#e8e8e8"  # of text, of lesser text, of the grid behind curves
TIMES = "\N{MULTIPLICATION SIGN}"


class Page:
    """A white page of `width` x `height` inches; x and y are those of an item's top left corner."""

    def __init__(self, width: float, height: float, dpi: int = 120):
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Writes text as it is, a $ in a file name is a $; `style` are options of matplotlib's `Figure.text`."""
        style = {"size": 9, "color": INK, "va": "top", "parse_math": False} | style
        self.figure.text(x / self.width, 1 - y / self.height, words, **style)

    def heading(
        self, margin: float, title: str, subtitle: str, numbers: Iterable[tuple[str, str, str]], columns: int
    ) -> None:
        """Writes a title, a subtitle, and, in columns that share the width, (label, number, colour) in large type."""
        self.text(margin, margin - 0.1, title, size=12, weight="bold")
        self.text(margin, margin + 0.16, subtitle, color=FAINT)
        for i, (label, number, colour) in enumerate(numbers):
            x = margin + i * (self.width - 2 * margin) / columns
            self.text(x, margin + 0.48, number, size=18, weight="bold", color=colour)
            self.text(x, margin + 0.84, label, color=FAINT)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Adds matplotlib axes of `width` x `height` inches at (x, y)."""
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def picture(self, x: float, y: float, width: float, height: float, pixels: np.ndarray) -> None:
        """Shows `pixels` (H, W, 3) in `width` x `height` inches at (x, y)."""
        axes = self.axes(x, y, width, height)
        axes.imshow(pixels, aspect="auto")
        axes.set_axis_off()

    def plot(self, x: float, y: float, width: float, height: float, title: str) -> Any:
        """Adds axes for curves, `width` x `height` inches at (x, y), with a title above and a light grid."""
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
