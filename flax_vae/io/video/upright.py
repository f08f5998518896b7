"""Turns decoded frames upright, as uint8 RGB (H, W, 3), scaled and cropped: H W pixels."""

from typing import Any

import numpy as np

from flax_vae.io.files import PathLike
from flax_vae.io.pixels import Size, is_only_cropped
from flax_vae.io.video.exif import UPRIGHT, Matrix, still_matrix
from flax_vae.io.video.heif import read_grid


def accurate():
    """Returns how to convert between RGB and YUV: the default is faster, and turns white into 253."""
    from av.video.reformatter import Interpolation

    return Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Upright:
    """How the frames of a file are turned and mirrored: as the file of a still says, otherwise by each one's matrix."""

    def __init__(self, path: PathLike):
        grid = read_grid(path)
        self._still = grid.matrix if grid else still_matrix(path)
        # By rotation, and not read of each frame: a frame and its list of side data hold each other, pixels and all,
        # until garbage is collected.
        self._matrices: dict[float, Matrix] = {}

    def size(self, frame: Any) -> Size:
        """Returns the (height, width) of a PyAV frame that stands upright."""
        return _transposed(self._matrix(frame), (frame.height, frame.width))

    def pixels(
        self, frame: Any, size: Size, position: tuple[float, float] = (0.5, 0.5), zoom: float = 1.0
    ) -> np.ndarray:
        """Returns a frame upright; arguments as of `draw_frames`."""
        matrix = self._matrix(frame)
        height, width = _transposed(matrix, (frame.height, frame.width))
        cover = max(size[0] / height, size[1] / width)
        scale = 1 if is_only_cropped((height, width), size) else max(cover, min(cover * zoom, 1))
        height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        stored = _transposed(matrix, (height, width))
        picture = frame.reformat(height=stored[0], width=stored[1], format="rgb24", interpolation=accurate())
        top, left = (int(at * (have - want)) for at, have, want in zip(position, (height, width), size, strict=True))
        pixels = _turned(picture.to_ndarray(), matrix)
        return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]])

    def _matrix(self, frame: Any) -> Matrix:
        if self._still:
            return self._still
        if frame.rotation not in self._matrices:
            self._matrices[frame.rotation] = _display_matrix(frame)
        return self._matrices[frame.rotation]


def _display_matrix(frame: Any) -> Matrix:
    try:
        data = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    except ValueError:  # PyAV knows no side data that is newer than itself, and then lists none
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
    if data is None or len(bytes(data)) < 36:
        return UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), "=i4").tolist()
    return (0, _sign(b), _sign(c), 0) if abs(b) + abs(c) > abs(a) + abs(d) else (_sign(a), 0, 0, _sign(d))


def _sign(number: int) -> int:
    return -1 if number < 0 else 1


def _transposed(matrix: Matrix, size: Size) -> Size:
    return size if matrix[0] else (size[1], size[0])


def _turned(pixels: np.ndarray, matrix: Matrix) -> np.ndarray:
    a, b, c, d = matrix
    if not a:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: b + d, :: a + c]
