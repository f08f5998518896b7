"""Self-attention among the pixels of one frame: B batch, T frames, H W pixels, C channels."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array

from flax_vae.layers.conv import Clip, TorchLeaves, init_weights
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.strips import strips
from flax_vae.ops.precision import accumulation_dtype, add_bias

MAX_SCORES = 2**24  # computed at a time: 64 MiB of float32, and as much again after the softmax


class Linear(nnx.Linear):
    """Linear layer over the last axis, its bias added in float32 or better."""

    torch: ClassVar[TorchLeaves] = {"kernel": ("weight", (1, 0)), "bias": ("bias", (0,))}

    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        y = x @ self.kernel[...]
        return y if self.bias is None else add_bias(y, self.bias[...])


class Attention(nnx.Module):
    """Self-attention within each frame, added to its input: one head of C channels, scale C ** -0.5.

    The softmax is taken in float32 or better (Vaswani et al. 2017; layout of the public checkpoints).
    """

    def __init__(self, channels: int, num_groups: int = 32, *, rngs: nnx.Rngs):
        def projection():
            return Linear(channels, channels, kernel_init=init_weights, rngs=rngs)

        self.group_norm = CausalGroupNorm(num_groups, channels, rngs=rngs)
        self.to_q, self.to_k, self.to_v = projection(), projection(), projection()
        self.to_out = nnx.List([projection()])

    def __call__(self, x: Clip) -> Clip:
        """Attends within every frame of (B, T, H, W, C); the shape stays."""
        pixels = strips().join(self.group_norm(x))
        query, key, value = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        return x + strips().cut(self.to_out[0](attend(query, key, value)))


def attend(query: Clip, key: Clip, value: Clip) -> Clip:
    """Returns for each pixel of (B, T, H, W, C) the values of its frame, weighted by softmax(query * key / sqrt(C)).

    A clip with more than `MAX_SCORES` scores takes every n-th column of queries at a time, and a gradient recomputes
    their scores.
    """
    key, value = (rearrange(x, "b t h w c -> b t (h w) c") for x in (key, value))

    def attended(query):
        scores = jnp.einsum("bthwc,btkc->bthwk", query, key, preferred_element_type=accumulation_dtype(query))
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
        return jnp.einsum("bthwk,btkc->bthwc", weights, value)

    parts = column_parts(*query.shape[1:4])
    if parts == 1:
        return attended(query)
    # every n-th column, not n blocks of columns: a mesh that divides height or width then keeps each part divided
    query = rearrange(query, "b t h (w part) c -> part b t h w c", part=parts)
    return rearrange(jax.lax.map(jax.checkpoint(attended), query), "part b t h w c -> b t h (w part) c")


def column_parts(frames: int, height: int, width: int) -> int:
    """Returns into how many parts, equally wide, to divide queries, for at most `MAX_SCORES` each where possible."""
    scores = frames * (height * width) ** 2
    return next((parts for parts in range(1, width) if width % parts == 0 and scores <= MAX_SCORES * parts), width)
