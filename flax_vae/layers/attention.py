"""Self-attention among the pixels of one frame: B batch, T frames, H W pixels, C channels."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array

from flax_vae.layers.conv import Clip, add_bias, initial_weights, wide_dtype
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.strips import strips


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
        frames = strips().join(self.group_norm(x))
        pixels = rearrange(frames, "b t h w c -> b t (h w) c")
        query, key, value = (linear(layer, pixels) for layer in (self.to_q, self.to_k, self.to_v))
        scores = jnp.einsum("btqc,btkc->btqk", query, key, preferred_element_type=wide_dtype(x)) * x.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        attended = linear(self.to_out[0], jnp.einsum("btqk,btkc->btqc", weights, value))
        return x + strips().cut(attended.reshape(frames.shape))


def linear(layer: nnx.Linear, x: Array) -> Array:
    """Applies a linear layer as nnx does, but with the bias added in float32 or better."""
    y = x @ layer.kernel[...]
    return y if layer.bias is None else add_bias(y, layer.bias[...])
