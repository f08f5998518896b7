"""Halos in time: streams whose frames lie on several devices, in order. B batch, T frames, H W pixels, C channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TimeHalo:
    """A carry for frames that N devices share: each but the first takes its halo from the devices before it.

    To the layers, the share of each device is a clip of its own: (B, T) are (N * B, T / N). `carry` is that of the
    stream, (N * B, frames, H, W, C), of which every device has a copy; the first device goes on from it.
    """

    carry: Any  # an array, or what stands for it where jax and flax map a tree
    devices: int = field(metadata={"static": True})

    def before(self, x: Array) -> Array:
        """Returns the frames before those of each (N * B, T, H, W, C), as many as the carry has.

        Where a device holds fewer frames than that, they come from several devices: one collective permute a hop.
        """
        count = self.carry.shape[1]
        if count == 0:
            return x[:, :0]
        length = min(count, x.shape[1])  # frames that one device can give: a hop fetches so many
        hops = -(-count // length)
        ends = x[:, x.shape[1] - length :].reshape(self.devices, -1, length, *x.shape[2:])  # N B length H W C
        padded = jnp.pad(self.carry, ((0, 0), (hops * length - count, 0), *((0, 0),) * (x.ndim - 2)))
        given = padded.reshape(self.devices, -1, hops, length, *x.shape[2:])
        # the oldest block first: it has come `hops` devices far, the newest one device
        blocks = [self._sent(ends, given[:, :, hops - hop :], hop) for hop in range(hops, 0, -1)]
        return jnp.concatenate(blocks, axis=1)[:, hops * length - count :]

    def _sent(self, ends: Array, given: Array, hop: int) -> Array:
        """Returns on each device the last frames of the one `hop` places before it; where there is none, the carry's.

        `given` (N, B, hop, ...) are the last `hop` blocks of the carry: device p < hop has only p devices before it, so
        its block is the p-th of these.
        """
        places = jnp.arange(self.devices).reshape(-1, *(1,) * (ends.ndim - 1))
        sent = jnp.roll(ends, hop, axis=0)
        for place in range(min(hop, self.devices)):
            sent = jnp.where(places == place, given[:, :, place], sent)
        return sent.reshape(-1, *ends.shape[2:])


def frames_before(carry: Any, x: Array) -> Array:
    """Returns the frames that a carry stands for, before those of (B, T, H, W, C)."""
    return carry.before(x) if isinstance(carry, TimeHalo) else carry
