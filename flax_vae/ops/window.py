"""The window of a convolution: stride, padding, dilation, groups; and which frames each time tap of a kernel sees.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flax_vae.ops.geometry import Pair, Triple, conv_outputs

Lowering = Literal["platform", "plain", "stacked", "per_frame", "winograd"]
_lowering = jax.make_user_context("platform")  # part of the key under which jax caches programs


@contextlib.contextmanager
def lowered(by: Lowering) -> Iterator[None]:
    """Within it convolutions are traced with one lowering where it supports them, or as suits the platform.

    "plain" is XLA's own; what Winograd's products do not support runs per frame, and what no other does, as XLA's.
    """
    with _lowering(by):
        yield


def lowering() -> Lowering:
    """Returns the lowering of convolutions where this is called."""
    return _lowering.value


@dataclass(frozen=True)
class Window:
    """Stride, padding and dilation of time, height and width, groups, and the lowering that is asked for."""

    stride: Triple
    padding: tuple[Pair, Pair, Pair]
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    lowering: Lowering = field(default_factory=lowering)

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Returns the output's time, height and width, 0 where the input is too small."""
        axes = zip(size, kernel[:3], self.stride, self.padding, self.dilation, strict=True)
        return tuple(conv_outputs(*axis) for axis in axes)

    def mirrored(self, kernel: Sequence[int]) -> Window:
        """Returns the window in which the mirrored kernel maps gradients of outputs to those of inputs, at stride 1."""
        reach = [(k - 1) * dilation for k, dilation in zip(kernel[:3], self.dilation, strict=True)]
        time, height, width = ((r - low, r - high) for r, (low, high) in zip(reach, self.padding, strict=True))
        return replace(self, padding=(time, height, width))

    def time_taps(self, kernel: int, frames: int) -> list[Tap]:
        """Lists those of `kernel` time taps that see any of the frames; the others see padding alone."""
        stride, dilation, before = self.stride[0], self.dilation[0], self.padding[0][0]
        outputs = conv_outputs(frames, kernel, stride, self.padding[0], dilation)
        taps = []
        for index in range(kernel):
            ahead = index * dilation - before  # the tap of output i sees frame i * stride + ahead
            start, stop = max(0, -(ahead // stride)), min(outputs, (frames - 1 - ahead) // stride + 1)
            if start < stop:
                taps.append(Tap(index, start, stop, start * stride + ahead, stride))
        return taps


@dataclass(frozen=True)
class Tap:
    """A time tap: its outputs `start` to `stop` see the frames from `frame` on, a stride apart."""

    index: int
    start: int
    stop: int
    frame: int
    stride: int

    @property
    def frames(self) -> slice:
        """The frames that it sees."""
        return slice(self.frame, self.frame + (self.stop - self.start - 1) * self.stride + 1, self.stride)


def mirrored(kernel: Array) -> Array:
    """Returns the kernel that, in `Window.mirrored`, maps gradients of outputs to those of inputs: O to I channels."""
    return jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)


def fold_frames(x: Array) -> Array:
    """Folds time into the batch: (B, T, H, W, C) becomes (B * T, H, W, C)."""
    return x.reshape(-1, *x.shape[2:])


def pad_frames(part: Array, start: int, frames: int, step: int = 1) -> Array:
    """Pads with frames of zeros, so that those of `part` become `start`, `start + step`, ... of `frames` frames."""
    after = frames - start - (part.shape[1] - 1) * step - 1
    return lax.pad(part, jnp.zeros((), part.dtype), ((0, 0, 0), (start, after, step - 1), *((0, 0, 0),) * 3))
