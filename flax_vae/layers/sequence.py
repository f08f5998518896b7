"""Layers over time, one after the other: B batch, T frames, H W pixels, C channels.

The one rule for time: a layer is `layer(x, carry=None) -> (y, carry)`. No carry is the start of a stream; otherwise the
carry stands before `x`. Whole clip, chunk, scan, remat and shard are the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import call
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from flax_vae.layers.conv import Clip
from flax_vae.layers.remat import remat
from flax_vae.layers.scan import scan_chunks
from flax_vae.layers.strips import Strips, frames_in_strips, strips_for


@runtime_checkable
class Streamed(Protocol):
    """A layer over time; its carry is a pytree of constant shape, `()` where the layer keeps nothing."""

    @property
    def frames_a_step(self) -> int:
        """Input frames that complete one step of the layer: 2 where time is halved, otherwise 1."""
        ...

    def __call__(self, x: Clip, carry: Any = None) -> tuple[Clip, Any]:
        """Maps the next frames (B, T, H, W, C) of a stream; returns the output and the carry."""
        ...


@dataclass(frozen=True)
class Execution:
    """How a model runs, in less memory and with the same values; of the run, not of the checkpoint.

    Attributes:
      remat: a gradient keeps only what passes between layers, and recomputes the inside of each. On CPU this saves
        memory only without XLA's pass cse_barrier_expander, which recomputes too early.
      frame_by_frame: a frame goes through as many layers as can take one before the next frame does, in the memory of
        one frame, in a gradient too: for frames so large that those of one latent do not fit.
    """

    remat: bool = False
    frame_by_frame: bool = False


def run_layers(
    layers: Iterable[Any], x: Clip, carry: Any = None, execution: Execution = Execution()
) -> tuple[Clip, tuple]:
    """Runs `x` through layers over time; the carry has one entry a layer.

    Args:
      layers: `Streamed` layers, or functions (x, carry) -> (y, carry).
      x: the next frames of a stream, (B, T, H, W, C).
      carry: what the last call returned; None at the start of a stream.
      execution: what is recomputed, and how many frames are computed at a time.

    Raises:
      ValueError: a carry of another number of entries.
    """
    layers = list(layers)
    before = (None,) * len(layers) if carry is None else carry
    if len(before) != len(layers):
        raise ValueError(
            f"a carry of {len(before)} entries cannot go through {len(layers)} layers: use the carry of the same model"
        )
    if execution.frame_by_frame:
        return run_frame_by_frame(layers, x, before)
    after = []
    for index, (layer, entry) in enumerate(zip(layers, before, strict=True)):
        with jax.named_scope(f"{type(layer).__name__}_{index}"):
            if execution.remat and isinstance(layer, Chain):
                x, entry = layer(x, entry, execution)
            elif execution.remat:
                x, entry = remat(call, layer, x, entry)
            else:
                x, entry = layer(x, entry)
        after.append(entry)
    return x, tuple(after)


def run_frame_by_frame(layers: Sequence[Streamed], x: Clip, carry: tuple) -> tuple[Clip, tuple]:
    """Runs each group of `frame_groups` over the chunk before the next group: between groups the whole chunk waits."""
    after: tuple = ()
    for group in frame_groups(layers):
        x, entries = run_group(group, x, carry[len(after) : len(after) + len(group)])
        after += entries
    return x, after


def frame_groups(layers: Iterable[Streamed]) -> list[tuple]:
    """Cuts layers into groups that one frame can pass at once: before each layer that takes several frames a step."""
    groups: list[tuple] = []
    for layer in layers:
        if not groups or layer.frames_a_step > 1:
            groups.append(())
        groups[-1] += (layer,)
    return groups


def run_group(layers: tuple, x: Clip, carry: tuple) -> tuple[Clip, tuple]:
    """Scans a chunk in steps of the first layer; what comes of a step passes all layers before the next step."""
    return scan_chunks(layers, run_step, x, layers[0].frames_a_step, None if carry[0] is None else carry)


def run_step(layers: tuple, x: Clip, carry: tuple | None) -> tuple[Clip, tuple]:
    """Runs the first layer, then the others frame by frame: a layer that doubles time is followed by several frames."""
    before = (None,) * len(layers) if carry is None else carry
    x, first = layers[0](x, before[0])
    if len(layers) == 1:
        return x, (first,)
    x, rest = run_group(layers[1:], x, before[1:])
    return x, (first, *rest)


class Chain(nnx.Module):
    """A block, encoder or decoder that is nothing but layers over time, one after the other."""

    def layers(self) -> list[Any]:
        """Lists the layers in the order in which they run."""
        raise NotImplementedError

    @property
    def frames_a_step(self) -> int:
        """Input frames that complete one step of every layer."""
        return math.prod(layer.frames_a_step for layer in self.layers())

    def __call__(self, x: Clip, carry: Any = None, execution: Execution = Execution()) -> tuple[Clip, Any]:
        """Maps (B, T, H, W, in) to (B, T', H', W', out); returns it and the carry."""
        return run_layers(self.layers(), x, carry, execution)


class Coder(Chain):
    """An encoder or decoder: a chain that runs as its `execution` says, in the strips that suit the platform.

    A row of strips has a multiple of `strip_rows` rows: the pixels of a latent for an encoder, 1 for a decoder.
    """

    def __init__(self, strip_rows: int = 1):
        self.strip_rows, self.execution = strip_rows, Execution()

    def __call__(self, x: Clip, carry: Any = None) -> tuple[Clip, Any]:
        """Maps a clip or a chunk of it, (B, T, H, W, in); returns the output and the carry."""
        # frame by frame is for memory, and strips are not: 720p in strips takes 27.4 GiB of a TPU, whole 15.6
        whole = self.execution.frame_by_frame
        strips = Strips() if whole else strips_for(len(x), x.shape[2:4], self.strip_rows)
        with frames_in_strips(strips):
            x, carry = run_layers(self.layers(), strips.cut(x), carry, self.execution)
        return strips.join(x), carry
