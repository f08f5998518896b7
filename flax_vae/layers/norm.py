"""Group normalisation of one frame at a time: B batch, T frames, H W pixels, C channels."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_vae.layers.conv import Clip, TorchLeaves, check_clip
from flax_vae.layers.strips import strips
from flax_vae.ops.precision import accumulation_dtype, per_frame


class CausalGroupNorm(nnx.Module):
    """Group normalisation over the pixels of a single frame, so that no frame sees another.

    y = (x - mean) / sqrt(var + eps) * scale + bias, with the two-pass variance in float32 or better (Wu & He 2018).
    Raises ValueError when `num_groups` does not divide `num_channels`.
    """

    torch: ClassVar[TorchLeaves] = {"scale": ("weight", (0,)), "bias": ("bias", (0,))}

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
        wide = x.astype(accumulation_dtype(x))
        scale, bias = (per_frame(each[...].astype(wide.dtype), x) for each in (self.scale, self.bias))
        centred = wide - self.group_mean(wide)
        scale = jax.lax.rsqrt(self.group_mean(jnp.square(centred)) + self.eps) * scale
        return (centred * scale + bias).astype(x.dtype)

    def group_mean(self, x: Clip) -> Array:
        """Averages over the pixels of each frame and the channels of a group; returns (B, T, 1, 1, C).

        Channels stay one axis, over which loops are vectorized, until pixels are summed: rows and columns in one go,
        which XLA's CPU backend gives to YNNPACK, with its many partial sums.
        """
        of_channels = strips().mean(x.mean(axis=(2, 3)))
        size = self.num_channels // self.num_groups
        of_groups = of_channels.reshape(*x.shape[:2], self.num_groups, size).mean(axis=3)
        return jnp.repeat(of_groups, size, axis=2)[:, :, None, None]
