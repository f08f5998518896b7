"""Halving and doubling of space and of time: B batch, T frames, H W pixels, C channels."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from flax_vae.layers.conv import CausalConv3d, Clip, check_clip, check_start
from flax_vae.layers.time_halo import frames_before
from flax_vae.ops import schedule
from flax_vae.ops.geometry import Triple, triple
from flax_vae.ops.precision import accumulation_dtype


class AvgPool3d(nnx.Module):
    """Average pooling over time, height and width, as torch's AvgPool3d, on B T H W C.

    Raises ValueError when the padding is more than half of the kernel, or a size is less than 1.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ):
        self.kernel_size, self.padding = triple(kernel_size), triple(padding)
        self.stride = self.kernel_size if stride is None else triple(stride)
        if min(*self.kernel_size, *self.stride) < 1:
            raise ValueError(f"kernel and stride must be at least 1, got {self.kernel_size}, {self.stride}")
        if any(2 * pad > kernel for pad, kernel in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding {self.padding} must be at most half of the kernel {self.kernel_size}")
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def __call__(self, x: Clip) -> Clip:
        """Pools (B, T, H, W, C); raises ValueError when it is smaller than the kernel."""
        check_clip(x, x.shape[-1])
        axes = zip(x.shape[1:4], self.kernel_size, self.stride, self.padding, strict=True)
        counts = [window_counts(*axis, self.ceil_mode, self.count_include_pad) for axis in axes]
        padding = [(0, 0), *map(self._around, range(3), x.shape[1:4], map(len, counts)), (0, 0)]
        wide = accumulation_dtype(x)
        window, stride = (1, *self.kernel_size, 1), (1, *self.stride, 1)
        sums = jax.lax.reduce_window(x.astype(wide), np.zeros((), wide), jax.lax.add, window, stride, padding)
        area = np.einsum("t,h,w->thw", *counts)[None, ..., None]
        return (sums / area.astype(wide)).astype(x.dtype)

    def _around(self, axis: int, size: int, windows: int) -> tuple[int, int]:
        """Returns the zeros before and after an axis that its windows reach into."""
        reach = (windows - 1) * self.stride[axis] + self.kernel_size[axis] - self.padding[axis]
        return self.padding[axis], max(0, reach - size)


def window_counts(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, include_pad: bool) -> np.ndarray:
    """Counts, for every pooling window along one axis, the elements that torch divides by.

    With `ceil_mode` a last window may reach past the padding, where nothing counts, but never starts past the input.
    """
    room = size + 2 * padding - kernel
    if room < 0 and size:
        raise ValueError(
            f"pooling windows of {kernel} need more than {size} elements with padding {padding}: use a larger input"
        )
    windows = (room + (stride - 1 if ceil_mode else 0)) // stride + 1 if size else 0
    starts = np.arange(windows) * stride - padding
    starts = starts[starts < size]
    if include_pad:
        return np.minimum(starts + kernel, size + padding) - starts
    return np.minimum(starts + kernel, size) - np.maximum(starts, 0)


class _Downsample(nnx.Module):
    """A causal 3x3x3 convolution of a stride, or the average of as many pixels."""

    stride: ClassVar[Triple]

    def __init__(self, channels: int, out_channels: int | None = None, use_conv: bool = True, *, rngs: nnx.Rngs):
        out_channels = out_channels or channels
        if not use_conv and out_channels != channels:
            raise ValueError(
                f"average pooling keeps {channels} channels and cannot give {out_channels}: use a convolution"
            )
        conv = partial(CausalConv3d, channels, out_channels, 3, rngs=rngs)
        self.conv = conv(self.stride) if use_conv else AvgPool3d(self.stride)


class SpatialDownsample(_Downsample):
    """Halves height and width: a causal 3x3x3 convolution of stride (1, 2, 2), or the average of 2x2 pixels.

    The convolution rounds odd sizes up, the average down. Averaging cannot change the channels: ValueError.
    """

    frames_a_step = 1
    stride = (1, 2, 2)

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, C) to (B, T, H / 2, W / 2, out); returns it and the carry."""
        return self.conv(x, carry) if isinstance(self.conv, CausalConv3d) else (self.conv(x), ())


class TemporalDownsample(_Downsample):
    """Halves time: 2k + 1 frames at the start of a stream become k + 1, later 2k become k.

    By a causal 3x3x3 convolution of stride (2, 1, 1), or by the average of two frames; the first frame of the stream
    is then averaged with itself, and an odd frame waits in the carry. Averaging cannot change the channels: ValueError.
    """

    frames_a_step = 2
    stride = (2, 1, 1)

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, C) to about half the frames; returns it and the carry."""
        if isinstance(self.conv, CausalConv3d):
            return self.conv(x, carry)
        if carry is None:
            check_start(x)
            carry = x[:, :1]
        x = jnp.concatenate([frames_before(carry, x), x], axis=1)
        whole = x.shape[1] // 2 * 2
        return self.conv(x[:, :whole]), x[:, whole:]


class SpatialUpsample(nnx.Module):
    """Doubles height and width: a causal 3x3x3 convolution to 4 values a channel, then the pixel shuffle."""

    frames_a_step = 1

    def __init__(self, channels: int, out_channels: int | None = None, *, rngs: nnx.Rngs):
        self.conv = CausalConv3d(channels, 4 * (out_channels or channels), 3, rngs=rngs)

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, C) to (B, T, 2H, 2W, out); returns it and the carry."""
        y, carry = self.conv(x, carry)
        return schedule.materialize_on_cpu(rearrange(y, "b t h w (c p1 p2) -> b t (h p1) (w p2) c", p1=2, p2=2)), carry


class TemporalUpsample(nnx.Module):
    """Doubles time: a causal 3x3x3 convolution to 2 values a channel, dealt out to two frames each.

    The first frame of a stream is one frame only, so k + 1 frames become 2k + 1, and later k become 2k.
    """

    frames_a_step = 1

    def __init__(self, channels: int, out_channels: int | None = None, *, rngs: nnx.Rngs):
        self.conv = CausalConv3d(channels, 2 * (out_channels or channels), 3, rngs=rngs)

    def __call__(self, x: Clip, carry=None):
        """Maps (B, T, H, W, C) to (B, 2T - 1 or 2T, H, W, out); returns it and the carry."""
        y, after = self.conv(x, carry)
        y = rearrange(y, "b t h w (c p) -> b (t p) h w c", p=2)
        return schedule.materialize_on_cpu(y[:, 1:] if carry is None else y), after
