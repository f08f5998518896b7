"""Streams whose frames lie on several devices, in order: B batch, T frames, H W pixels, C channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FromNeighbour:
    """A carry that each device but the first gets from the devices before it, which hold the frames before its own.

    `carry` is that of the stream, which the first device goes on from; `axis` is the mesh axis, within
    `jax.shard_map`, that time is divided over. All devices hold equally many frames.
    """

    carry: Array
    axis: str = field(metadata={"static": True})

    def before(self, x: Array) -> Array:
        """Gives the frames before this device's (B, T, H, W, C), as many as the carry has.

        Where a device holds fewer frames than that, they come from several devices.
        """
        count = self.carry.shape[1]
        if count == 0:
            return self.carry
        length = min(count, x.shape[1])
        hops = -(-count // length)
        sent = [self._sent(x[:, x.shape[1] - length :], hop, hops) for hop in range(hops, 0, -1)]
        return jnp.concatenate(sent, axis=1)[:, hops * length - count :]

    def _sent(self, last: Array, hop: int, hops: int) -> Array:
        """Gives the frames of the device `hop` places before this one, from the carry where there is none."""
        place, devices, length = lax.axis_index(self.axis), lax.axis_size(self.axis), last.shape[1]
        sent = lax.ppermute(last, self.axis, [(i, i + hop) for i in range(devices - hop)])
        padded = jnp.pad(self.carry, ((0, 0), (hops * length, 0), *((0, 0),) * (last.ndim - 2)))
        own = lax.dynamic_slice_in_dim(padded, padded.shape[1] + (place - hop) * length, length, axis=1)
        return jnp.where(place >= hop, sent, own)


def frames_before(carry: Array | FromNeighbour, x: Array) -> Array:
    """Gives the frames that a carry stands for, before those of (B, T, H, W, C)."""
    return carry.before(x) if isinstance(carry, FromNeighbour) else carry
