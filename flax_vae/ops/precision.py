"""Precision of sums: float32 or better, whatever the dtype of what is summed."""

import numpy as np
from jaxtyping import Array


def accumulation_dtype(x: Array) -> np.dtype:
    """Returns the dtype in which sums over `x` are taken: float32 or better."""
    return np.promote_types(x.dtype, np.float32)


def add_bias(y: Array, bias: Array) -> Array:
    """Adds a bias (C) to (..., C) in float32 or better, in which its gradient, a sum over all pixels, is summed too."""
    bias = bias.astype(accumulation_dtype(y)).reshape((1,) * (y.ndim - 1) + bias.shape)
    return (y.astype(bias.dtype) + bias).astype(y.dtype)


def mean(values: Array, axes: int | None = None) -> Array:
    """Averages over the last `axes`, or all, in float32 or better.

    One axis after the other: sums of sums round less than one long sum.
    """
    values = values.astype(accumulation_dtype(values))
    for _ in range(values.ndim if axes is None else axes):
        values = values.mean(axis=-1)
    return values
