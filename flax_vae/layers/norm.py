"""Group normalisation of one frame at a time: B batch, T frames, H W pixels, C channels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_vae.layers.conv import Clip, check_clip, wide_dtype


class CausalGroupNorm(nnx.Module):
    """Normalises each group of channels over the pixels of a single frame, so that no frame sees another.

    y = (x - mean) / sqrt(var + eps) * scale + bias, with the two-pass variance in float32 or better (Wu & He 2018).
    Raises ValueError when `num_groups` does not divide `num_channels`.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-6, *, rngs: nnx.Rngs):
        del rngs  # ones and zeros need no randomness; the signature is every layer's
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"{num_groups} norm groups must divide {num_channels} channels")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.scale = nnx.Param(jnp.ones(num_channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_channels, jnp.float32))

    def __call__(self, x: Clip) -> Clip:
        """Normalises (B, T, H, W, C) and returns it in the dtype it came in."""
        check_clip(x, self.num_channels)
        groups = x.astype(wide_dtype(x)).reshape(*x.shape[:4], self.num_groups, self.num_channels // self.num_groups)
        centred = groups - frame_mean(groups)
        scale = jax.lax.rsqrt(frame_mean(jnp.square(centred)) + self.eps) * per_channel(self.scale[...], groups)
        return (centred * scale + per_channel(self.bias[...], groups)).reshape(x.shape).astype(x.dtype)


def frame_mean(groups: Array) -> Array:
    """Averages (B, T, H, W, groups, channels) over the pixels and channels of each group in each frame.

    One axis after the other: sums of sums round less than one long sum.
    """
    return groups.mean(axis=3, keepdims=True).mean(axis=2, keepdims=True).mean(axis=5, keepdims=True)


def per_channel(parameter: Array, groups: Array) -> Array:
    """Brings one value a channel to the axes and the dtype of (B, T, H, W, groups, channels)."""
    return parameter.astype(groups.dtype).reshape(1, 1, 1, 1, *groups.shape[4:])
