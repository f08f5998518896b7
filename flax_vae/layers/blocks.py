"""Blocks of the encoder and decoder, and the function that hands the carry through them.

B batch, T frames, H W pixels, C channels.
"""

from collections.abc import Iterable
from operator import call

from flax import nnx

from flax_vae.layers.attention import Attention
from flax_vae.layers.conv import CausalConv3d, Clip
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.remat import call_again
from flax_vae.layers.resample import SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample
from flax_vae.layers.resnet import CausalResnetBlock, activated
from flax_vae.layers.scan import in_chunks
from flax_vae.layers.strips import Strips, frames_in_strips, strips_for


def thread(layers: Iterable, x: Clip, carry=None, remat: bool = False, frame_by_frame: bool = False):
    """Runs `x` through layers that see time; the carry is one entry a layer, or None at the start of a stream.

    With `remat` a gradient keeps only what passes between the layers, also those of blocks, and computes each of them
    a second time. With `frame_by_frame` a frame goes through as many layers as can take one, before the next does: all
    of them take the memory of one frame. A layer that halves time takes two, and waits for those of the whole chunk.
    Returns the output and the new carry. Raises ValueError when the carry has another number of entries.
    """
    layers = list(layers)
    before = (None,) * len(layers) if carry is None else carry
    if len(before) != len(layers):
        raise ValueError(
            f"a carry of {len(before)} entries cannot go through {len(layers)} layers: use the carry of the same model"
        )
    steps = cascades(layers) if frame_by_frame else [(layer,) for layer in layers]
    after: tuple = ()
    for step in steps:
        entries = before[len(after) : len(after) + len(step)]
        if frame_by_frame:
            x, entries = cascade(step, x, entries)
        else:
            (layer,), (entry,) = step, entries
            if remat:
                x, entry = layer(x, entry, remat) if isinstance(layer, Chain) else call_again(call, layer, x, entry)
            else:
                x, entry = layer(x, entry)
            entries = (entry,)
        after += entries
    return x, after


def thread_in_strips(layers: Iterable, x: Clip, carry, remat: bool, frame_by_frame: bool, factor: int):
    """Runs `x` through layers as `thread` does, in as many strips as suit the platform, `factor` pixels a latent.

    Frame by frame they stay whole: what it is for is memory, and 720p in strips takes 27.4 GiB of a TPU, not 15.6.
    """
    strips = Strips() if frame_by_frame else strips_for(len(x), x.shape[2:4], factor)
    with frames_in_strips(strips):
        x, carry = thread(layers, strips.cut(x), carry, remat, frame_by_frame)
    return strips.join(x), carry


def cascades(layers: Iterable) -> list[tuple]:
    """Cuts layers into those that a frame can go through at once: before each that takes more than one."""
    parts: list[tuple] = []
    for layer in layers:
        if not parts or frames_a_step(layer) > 1:
            parts.append(())
        parts[-1] += (layer,)
    return parts


def cascade(layers: tuple, x: Clip, carry: tuple):
    """Runs layers on as few frames at a time as the first takes; all that comes of these before the next ones."""
    return in_chunks(layers, fall, x, frames_a_step(layers[0]), None if carry[0] is None else carry)


def fall(layers: tuple, x: Clip, carry):
    """Runs the first layer, and the others in a cascade."""
    before = (None,) * len(layers) if carry is None else carry
    x, first = layers[0](x, before[0])
    if len(layers) == 1:
        return x, (first,)
    x, rest = cascade(layers[1:], x, before[1:])
    return x, (first, *rest)


def frames_a_step(layer) -> int:
    """Gives how many frames a layer takes at a time."""
    return getattr(layer, "frames_a_step", 1)


class Output(nnx.Module):
    """The end of an encoder or decoder: a norm, silu and a causal convolution."""

    def __init__(self, norm: CausalGroupNorm, conv: CausalConv3d):
        self.norm, self.conv = norm, conv

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, C) to (B, T, H, W, out); returns it and the carry."""
        return call_again(activated, (self.norm, self.conv), x, carry)


def resnet_chain(channels: int, out_channels: int, num_layers: int, *args, rngs: nnx.Rngs) -> nnx.List:
    """Builds `num_layers` residual blocks, the first of which changes the number of channels."""
    if num_layers < 1:
        raise ValueError(f"a block has at least one residual block, got {num_layers}")
    widths = [channels] + [out_channels] * (num_layers - 1)
    return nnx.List([CausalResnetBlock(width, out_channels, *args, rngs=rngs) for width in widths])


class Chain(nnx.Module):
    """A block of nothing but layers that see time, one after the other."""

    def layers(self) -> list[nnx.Module]:
        """Lists them in the order in which they run."""
        raise NotImplementedError

    def __call__(self, x: Clip, carry=None, remat: bool = False):
        """Maps (B, T, H, W, in) to (B, T', H', W', out); returns it and the carry."""
        return thread(self.layers(), x, carry, remat)


class DownBlock(Chain):
    """Residual blocks, then half the height and width, then half the frames, where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        spatial_downsample: bool = True,
        temporal_downsample: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.resnets = resnet_chain(
            in_channels, out_channels, num_layers, num_groups, dropout, output_scale_factor, rngs=rngs
        )
        self.downsamplers = nnx.List([SpatialDownsample(out_channels, rngs=rngs)] if spatial_downsample else [])
        self.temporal_downsamplers = nnx.List(
            [TemporalDownsample(out_channels, rngs=rngs)] if temporal_downsample else []
        )
        self.frames_a_step = 2 ** len(self.temporal_downsamplers)

    def layers(self):
        """Lists them in the order in which they run."""
        return [*self.resnets, *self.downsamplers, *self.temporal_downsamplers]


class MidBlock(nnx.Module):
    """A residual block, attention within each frame, and another residual block."""

    def __init__(
        self,
        channels: int,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.resnets = resnet_chain(channels, channels, 2, num_groups, dropout, output_scale_factor, rngs=rngs)
        self.attentions = nnx.List([Attention(channels, num_groups, rngs=rngs)])

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, C) to the same shape; returns it and the carry."""
        first, second = (None, None) if carry is None else carry
        x, first = self.resnets[0](x, first)
        x, second = self.resnets[1](self.attentions[0](x), second)
        return x, (first, second)


class UpBlock(Chain):
    """Residual blocks, then twice the height and width, then twice the frames, where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        spatial_upsample: bool = True,
        temporal_upsample: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.resnets = resnet_chain(
            in_channels, out_channels, num_layers, num_groups, dropout, output_scale_factor, rngs=rngs
        )
        self.upsamplers = nnx.List([SpatialUpsample(out_channels, rngs=rngs)] if spatial_upsample else [])
        self.temporal_upsamplers = nnx.List([TemporalUpsample(out_channels, rngs=rngs)] if temporal_upsample else [])

    def layers(self):
        """Lists them in the order in which they run."""
        return [*self.resnets, *self.upsamplers, *self.temporal_upsamplers]
