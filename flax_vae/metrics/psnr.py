"""PSNR, the peak signal-to-noise ratio of a reconstruction: B batch, T frames, H W pixels, C channels."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

MAX_PSNR = 100.0  # dB, where a number must be finite: that of equal frames is not


def psnr(a: ArrayLike, b: ArrayLike) -> float:
    """Returns the peak signal-to-noise ratio in dB over all values, inf where they are equal.

    10 log10(peak^2 / mean((a - b)^2)); the peak is 255 for uint8 and 2 for floats in [-1, 1], one and the same scale.
    Raises ValueError unless both have one shape and are both uint8 or both float.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or not a.size or _peak(a) != _peak(b):
        raise ValueError(f"cannot compare {a.dtype} {a.shape} with {b.dtype} {b.shape}: give one shape and one dtype")
    pairs = zip(a, b, strict=True) if a.ndim > 3 else [(a, b)]  # frame by frame: a long clip in float64 may not fit
    error = np.mean([np.mean(np.square(np.subtract(x, y, dtype=np.float64))) for x, y in pairs])
    return float(10 * math.log10(_peak(a) ** 2 / error)) if error else math.inf


def pooled_psnr(frames: Sequence[float]) -> float:
    """Returns the PSNR of a clip in dB from those of its frames: their mean squared errors are averaged."""
    error = math.fsum(10 ** (-value / 10) for value in frames) / len(frames)
    return -10 * math.log10(error) if error else math.inf


def _peak(values):
    if values.dtype == np.uint8:
        return 255
    if values.dtype.kind in "fV":  # V: bfloat16
        return 2
    raise ValueError(f"values are {values.dtype}, expected uint8 or floats in [-1, 1]")
