"""Self-attention among the pixels of one frame: B batch, T frames, H W pixels, C channels."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array

from flax_vae.layers.conv import Clip, add_bias, initial_weights
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.strips import strips
from flax_vae.ops.window import wide_dtype

MOST_SCORES = 2**24  # 64 MiB of float32, and twice that with what they become


class Attention(nnx.Module):
    """Adds to each pixel what it attends to in its own frame: one head of C channels, scale C ** -0.5.

    The softmax is taken in float32 or better (Vaswani et al. 2017; layout of the public checkpoints).
    """

    def __init__(self, channels: int, num_groups: int = 32, *, rngs: nnx.Rngs):
        def projection():
            return nnx.Linear(channels, channels, kernel_init=initial_weights, rngs=rngs)

        self.group_norm = CausalGroupNorm(num_groups, channels, rngs=rngs)
        self.to_q, self.to_k, self.to_v = projection(), projection(), projection()
        self.to_out = nnx.List([projection()])

    def __call__(self, x: Clip) -> Clip:
        """Attends within every frame of (B, T, H, W, C); the shape stays."""
        pixels = strips().join(self.group_norm(x))
        query, key, value = (linear(layer, pixels) for layer in (self.to_q, self.to_k, self.to_v))
        return x + strips().cut(linear(self.to_out[0], attend(query, key, value)))


def attend(query: Clip, key: Clip, value: Clip) -> Clip:
    """Gives for each pixel of (B, T, H, W, C) the values of its frame, weighted by softmax(query * key / sqrt(C)).

    Where a clip has more than `MOST_SCORES` of them, every n-th column of queries is taken at a time; a gradient
    computes their scores a second time. Shares of a mesh in height or width stay whole so.
    """
    key, value = (rearrange(x, "b t h w c -> b t (h w) c") for x in (key, value))

    def attended(query):
        scores = jnp.einsum("bthwc,btkc->bthwk", query, key, preferred_element_type=wide_dtype(query))
        weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
        return jnp.einsum("bthwk,btkc->bthwc", weights, value)

    parts = parts_of_columns(*query.shape[1:4])
    if parts == 1:
        return attended(query)
    query = rearrange(query, "b t h (w part) c -> part b t h w c", part=parts)
    return rearrange(jax.lax.map(jax.checkpoint(attended), query), "part b t h w c -> b t h (w part) c")


def parts_of_columns(frames: int, height: int, width: int) -> int:
    """Gives into how many parts, equally wide, to divide queries, for at most `MOST_SCORES` each where that can be."""
    scores = frames * (height * width) ** 2
    return next((parts for parts in range(1, width) if width % parts == 0 and scores <= MOST_SCORES * parts), width)


def linear(layer: nnx.Linear, x: Array) -> Array:
    """Applies a linear layer as nnx does, but with the bias added in float32 or better."""
    y = x @ layer.kernel[...]
    return y if layer.bias is None else add_bias(y, layer.bias[...])
