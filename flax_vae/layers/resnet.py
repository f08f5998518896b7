"""The residual block: B batch, T frames, H W pixels, C channels."""

from flax import nnx

from flax_vae.layers.conv import CausalConv3d, Clip
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.remat import call_again


class CausalResnetBlock(nnx.Module):
    """Two norms, silus and causal 3x3x3 convolutions beside a shortcut, which is a 1x1x1 convolution only where the
    number of channels changes; the sum is divided by `output_scale_factor`."""

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
        h, carry1 = call_again(activated, (self.norm1, self.conv1), x, carry1)
        h, carry2 = call_again(activated, (self.norm2, self.dropout, self.conv2), h, carry2)
        if self.conv_shortcut is not None:
            x, _ = self.conv_shortcut(x, None if carry is None else ())
        return (x + h) / self.output_scale_factor, (carry1, carry2)


def activated(layers: tuple, x: Clip, carry):
    """Runs a norm, silu, dropout where there is any, and a convolution; returns the output and the carry."""
    norm, *dropout, conv = layers
    x = nnx.silu(norm(x))
    for layer in dropout:
        x = layer(x)
    return conv(x, carry)
