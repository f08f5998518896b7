"""Precision of sums: float32 or better, whatever the dtype of what is summed."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flax_vae.ops import schedule


def accumulation_dtype(x: Array) -> np.dtype:
    """Returns the dtype in which sums over `x` are taken: float32 or better."""
    return np.promote_types(x.dtype, np.float32)


def add_bias(y: Array, bias: Array) -> Array:
    """Adds a bias (C) to (B, T, H, W, C) or (..., C) in float32 or better, in which its gradient is summed too."""
    bias = bias.astype(accumulation_dtype(y))
    return (y.astype(bias.dtype) + per_frame(bias, y)).astype(y.dtype)


def per_frame(parameter: Array, clip: Array) -> Array:
    """Repeats a parameter (C) for each frame of a clip (B, T, H, W, C): (B, T, 1, 1, C); of fewer axes, the first two.

    Its gradient is the sum over the pixels of each frame, then over frames. Sums of sums round less than one long sum,
    which XLA makes of the two unless a barrier is between them.
    """
    kept = min(2, clip.ndim - 1)
    shape = (*clip.shape[:kept], *(1,) * (clip.ndim - 1 - kept), *parameter.shape)
    return schedule.gradients_together(jnp.broadcast_to(parameter, shape))


def mean(values: Array, axes: int | None = None) -> Array:
    """Averages over the last `axes`, or all, in float32 or better.

    One axis after the other: sums of sums round less than one long sum.
    """
    values = values.astype(accumulation_dtype(values))
    for _ in range(values.ndim if axes is None else axes):
        values = values.mean(axis=-1)
    return values
