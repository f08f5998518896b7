"""Frames cut into strips, each an image of its own: B batch, T frames, H W pixels, C channels.

A TPU computes a convolution for eight images at a time. With fewer, XLA cuts the frames into eight parts by itself
("space to batch"), and joins them for each norm. Within `frames_in_strips` they are cut once for all layers:
(B, T, H, W, C) is (B * strips, T, H / strips, W, C), or the same of W. A convolution then takes the halo of a strip
from the strips beside it, a norm averages over all strips of a frame, and attention joins them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flax_vae.ops.geometry import Pair

IMAGES_AT_A_TIME = 8  # that a TPU computes


@dataclass(frozen=True)
class Strips:
    """How frames are cut: across which axis of (B, T, H, W, C), 2 or 3, and into how many."""

    axis: int = 2
    count: int = 1

    @property
    def name(self) -> str:
        """What is divided: rows or columns."""
        return "rows" if self.axis == 2 else "columns"

    def cut(self, x: Array) -> Array:
        """Cuts (B, T, H, W, C) into (B * strips, T, H / strips, W, C)."""
        if self.count == 1:
            return x
        size = x.shape[self.axis] // self.count
        x = x.reshape(*x.shape[: self.axis], self.count, size, *x.shape[self.axis + 1 :])
        return fold_strips(jnp.moveaxis(x, self.axis, 1))

    def join(self, x: Array) -> Array:
        """Undoes `cut`."""
        if self.count == 1:
            return x
        size = self.count * x.shape[self.axis]
        x = jnp.moveaxis(self.split(x), 1, self.axis)
        return x.reshape(*x.shape[: self.axis], size, *x.shape[self.axis + 2 :])

    def split(self, x: Array) -> Array:
        """Splits strips off the batch: (B * strips, ...) becomes (B, strips, ...)."""
        return x.reshape(len(x) // self.count, self.count, *x.shape[1:])

    def mean(self, x: Array) -> Array:
        """Averages (B * strips, ...) over all strips of a frame; each strip gets the average."""
        if self.count == 1:
            return x
        means = self.split(x).mean(axis=1, keepdims=True)
        return jnp.broadcast_to(means, (len(means), self.count, *x.shape[1:])).reshape(x.shape)

    def extended(self, x: Array, padding: tuple[Pair, Pair, Pair]) -> tuple[Array, tuple[Pair, Pair, Pair]]:
        """Replaces the padding of each strip by its halo, the rows of the strips beside it.

        Args:
          x: strips (B * strips, T, H, W, C).
          padding: (before, after) of time, height and width.

        Returns:
          The strips with their halos, and the padding that is left. The first and the last strip have zeros outside.

        Raises:
          ValueError: strips of fewer rows than the halo.
        """
        before, after = padding[self.axis - 1]
        if self.count == 1 or not (before or after):
            return x, padding
        if min(before, after) < 0 or max(before, after) > x.shape[self.axis]:
            raise ValueError(
                f"strips of {x.shape[self.axis]} {self.name} cannot be padded by {before} and {after}: "
                "cut frames into fewer strips"
            )
        strips, axis = self.split(x), self.axis + 1
        last = jax.lax.slice_in_dim(strips, x.shape[self.axis] - before, None, axis=axis)
        first = jax.lax.slice_in_dim(strips, 0, after, axis=axis)
        around = [shifted(last, 1), strips, shifted(first, -1)]
        time, rows, columns = ((0, 0) if i == self.axis - 1 else pair for i, pair in enumerate(padding))
        return fold_strips(jnp.concatenate(around, axis=axis)), (time, rows, columns)


def fold_strips(x: Array) -> Array:
    """Folds strips into the batch: (B, strips, ...) becomes (B * strips, ...)."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def shifted(x: Array, steps: int) -> Array:
    """Shifts (B, strips, ...) by one strip, to the next or to the one before, and fills with zeros."""
    kept = x[:, :-1] if steps > 0 else x[:, 1:]
    return jnp.pad(kept, ((0, 0), (1, 0) if steps > 0 else (0, 1), *((0, 0),) * (x.ndim - 2)))


_strips = jax.make_user_context(Strips())  # both are part of the key under which jax caches programs
_devices = jax.make_user_context(None)


def strips() -> Strips:
    """Returns how frames are cut where this is called."""
    return _strips.value


@contextmanager
def frames_in_strips(cut: Strips) -> Iterator[None]:
    """Within it layers take their inputs as strips."""
    with _strips(cut):
        yield


@contextmanager
def shared_by_tpus(devices: int | None) -> Iterator[None]:
    """Within it models cut frames into strips for N TPUs that share each batch; for 0 they cut none.

    Without it they cut strips where jax computes on a TPU.
    """
    with _devices(devices):
        yield


def strips_for(batch: int, size: Sequence[int], factor: int) -> Strips:
    """Returns the strips that make eight images a TPU of a batch of frames of a size (H, W), or as close as possible.

    Height, otherwise width, is divided evenly, in strips of whole latents, `factor` pixels each.
    """
    devices = _devices.value
    if devices is None:
        devices = int(jax.default_backend() == "tpu")
    if devices == 0 or batch % devices:
        return Strips()
    wanted = IMAGES_AT_A_TIME // math.gcd(batch // devices, IMAGES_AT_A_TIME)
    rows, columns = (math.gcd(length // factor, wanted) if length % factor == 0 else 1 for length in size)
    return Strips(2, rows) if rows >= columns else Strips(3, columns)
