"""Self-attention among the pixels of one frame: B batch, T frames, H W pixels, C channels."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from flax_vae.layers.conv import Clip
from flax_vae.layers.norm import CausalGroupNorm


class Attention(nnx.Module):
    """Adds to each pixel what it attends to in its own frame: one head of C channels, scale C ** -0.5.

    The softmax is taken in float32 or better (Vaswani et al. 2017; layout of the public checkpoints).
    """

    def __init__(self, channels: int, num_groups: int = 32, *, rngs: nnx.Rngs):
        def linear():
            return nnx.Linear(channels, channels, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

        self.group_norm = CausalGroupNorm(num_groups, channels, rngs=rngs)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])

    def __call__(self, x: Clip) -> Clip:
        """Attends within every frame of (B, T, H, W, C); the shape stays."""
        pixels = rearrange(self.group_norm(x), "b t h w c -> b t (h w) c")
        query, key, value = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("btqc,btkc->btqk", query, key, preferred_element_type=wide) * x.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        attended = self.to_out[0](jnp.einsum("btqk,btkc->btqc", weights, value))
        return x + attended.reshape(x.shape)
