"""The residual block: B batch, T frames, H W pixels, C channels."""

from typing import Any

from flax import nnx

from flax_vae.layers.conv import CausalConv3d, Clip
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.remat import remat


class CausalResnetBlock(nnx.Module):
    """Residual block: norm, silu and a causal 3x3x3 convolution, twice, beside a shortcut.

    The shortcut is a 1x1x1 convolution where the number of channels changes, otherwise the identity; the sum is divided
    by `output_scale_factor`.
    """

    frames_a_step = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ):
        out_channels = out_channels or in_channels
        self.norm1 = CausalGroupNorm(num_groups, in_channels, rngs=rngs)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, rngs=rngs)
        self.norm2 = CausalGroupNorm(num_groups, out_channels, rngs=rngs)
        # Without dropout there is no random state to carry through jit, checkpoints and streams.
        self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, rngs=rngs)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, 1, rngs=rngs) if in_channels != out_channels else None
        )
        self.output_scale_factor = output_scale_factor

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, in) to (B, T, H, W, out); returns it and the carry."""
        carry1, carry2 = (None, None) if carry is None else carry
        h, carry1 = remat(norm_silu_conv, (self.norm1, self.conv1), x, carry1)
        h, carry2 = remat(norm_silu_conv, (self.norm2, self.dropout, self.conv2), h, carry2)
        if self.conv_shortcut is not None:
            x, _ = self.conv_shortcut(x, None if carry is None else ())
        return (x + h) / self.output_scale_factor, (carry1, carry2)


class Head(nnx.Module):
    """The end of an encoder or decoder: a norm, silu and a causal convolution."""

    def __init__(self, norm: nnx.Module, conv: CausalConv3d):
        self.norm, self.conv = norm, conv

    @property
    def frames_a_step(self) -> int:
        """Those of the convolution."""
        return self.conv.frames_a_step

    def __call__(self, x: Clip, carry: Any = None) -> tuple[Clip, Any]:
        """Maps (B, T, H, W, C) to (B, T, H, W, out); returns it and the carry."""
        return remat(norm_silu_conv, (self.norm, self.conv), x, carry)


def norm_silu_conv(layers: tuple, x: Clip, carry: Any) -> tuple[Clip, Any]:
    """Runs a norm, silu, dropout where there is any, and a convolution; returns the output and the carry."""
    norm, *dropout, conv = layers
    x = nnx.silu(norm(x))
    for layer in dropout:
        x = layer(x)
    return conv(x, carry)
