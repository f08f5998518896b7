"""Pixels as files hold them, uint8, and as models take them, floats in [-1, 1]; and the size of a clip for a model."""

import re
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from flax_vae.io.finite import check_finite

Size = tuple[int, int]


def fit_size(height: int, width: int, multiple: int, size: int | Size | None = None) -> Size:
    """Returns the (height, width) to bring a clip to, both divisible by `multiple`; what is over is to be cropped.

    Args:
      height, width: the clip's own size, in pixels; one smaller than `multiple` is scaled up to it.
      multiple: the pixels of a latent, say.
      size: the short side, or (height, width), or None for the clip's own size.

    Raises:
      ValueError: a `size` smaller than `multiple`; anything below 1.
    """
    if min(height, width, multiple) < 1:
        raise ValueError(f"height={height}, width={width}, multiple={multiple}: expected 1 or more each")
    if size is not None and min((size,) if isinstance(size, int) else size) < multiple:
        raise ValueError(f"size={size}: too small, this model takes multiples of {multiple} pixels from {multiple} on")
    if size is None or isinstance(size, int):
        short = min(height, width)
        scale = Fraction(size or max(short, multiple), short)
        height, width = round(height * scale), round(width * scale)
    else:
        height, width = size
    return height // multiple * multiple, width // multiple * multiple


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Parses "256" as the short side and "288x512" as height and width."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,6}(x\d{1,6})?", text):
        raise ValueError(f"--size {text}: expected the short side, as 256, or height x width, as 288x512")
    height, *width = map(int, text.split("x"))
    return (height, width[0]) if width else height


def is_only_cropped(size: Size, wanted: Size) -> bool:
    """Whether frames are cropped without scaling, which keeps them sharp: both sides larger by under a sixteenth."""
    return all(0 <= 16 * (have - want) < have for have, want in zip(size, wanted, strict=True))


def to_float(frames: ArrayLike) -> np.ndarray:
    """Maps uint8 frames of any shape to float32 in [-1, 1]: 0 to -1, 255 to 1; ValueError for another dtype."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}, expected uint8: pixels from 0 to 255")
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(frames: ArrayLike) -> np.ndarray:
    """Maps float frames in [-1, 1] to the nearest uint8 and clips the rest; ValueError for integers, NaN and inf."""
    frames = np.asarray(frames)
    if frames.dtype.kind in "iub":
        raise ValueError(f"frames are {frames.dtype}, expected floats in [-1, 1]")
    frames = frames.astype(np.float32)
    check_finite("frames", frames)
    return np.rint((np.clip(frames, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
