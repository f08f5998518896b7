"""A clip sharded over a mesh: exactly the results of one device. B batch, T frames, H W pixels, C channels.

XLA's partitioner shards batch, height and width by itself, following the shardings of the inputs. Time is sharded here:
the first frame is a part of its own, which every device of `time` computes; the frames after it are divided evenly. The
share of a device is one more clip of the batch, whose carry is a `TimeHalo` from the devices before it. So a clip on a
mesh is a tuple of parts: the first frame and the rest where time is sharded, otherwise the clip as a whole.

A step is a function (module, clip, carry) -> (result, carry), such as `VideoVAE.encode_chunk`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from flax_vae.layers.scan import Step, scan_chunks
from flax_vae.layers.strips import shared_by_tpus
from flax_vae.layers.time_halo import TimeHalo
from flax_vae.ops.window import lowered
from flax_vae.runtime.mesh import clip_spec, sharding

Parts = tuple[Any, ...]
FOLDED = Spec(("time", "data"), None, "height", "width", None)  # of (N * B, T / N, H, W, C), see `fold_time`


def shard(clip: Any, mesh: Mesh) -> Parts:
    """Shards a clip (B, T, H, W, C) over a mesh, in parts; each of several processes passes its own clips."""
    shardings = (sharding(mesh, clip_spec(over_time)) for over_time in (False, True))
    if jax.process_count() == 1:
        return tuple(map(jax.device_put, split_parts(clip, mesh), shardings))
    return tuple(map(jax.make_array_from_process_local_data, shardings, split_parts(np.asarray(clip), mesh)))


def shard_step(chunk: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Shards a chunk of a stream (B, T, H, W, C) and its carry; to shapes, it adds their shardings."""

    def place(leaf, sharding):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    chunk = place(chunk, sharding(mesh, clip_spec(carry is not None)))
    return chunk, jax.tree.map(lambda leaf: place(leaf, sharding(mesh, clip_spec(False))), carry)


def run_step(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns what `step(module, x, carry)` returns, for a chunk and a carry of `shard_step`; inside a jit."""
    with lowered_for(mesh):
        if carry is None or mesh.shape["time"] == 1:
            result, after = step(module, x, carry)
        else:
            carry = jax.tree.map(lambda leaf: per_device_copies(leaf, mesh), carry)
            result, after = run_over_time(module, step, x, carry, mesh)
            after = jax.tree.map(lambda leaf: pick_device(0, leaf, mesh), after)
    return result, lax.with_sharding_constraint(after, sharding(mesh, clip_spec(False)))


@contextmanager
def lowered_for(mesh: Mesh | None) -> Iterator[None]:
    """Traces layers as suits the devices of a mesh: in strips on TPUs, where these divide the batch alone."""
    if mesh is None:
        yield
        return
    divides_clips = mesh.size > mesh.shape["data"]
    platform = mesh.devices.flat[0].platform
    # XLA's partitioner cannot divide frames that were merged with the batch, nor the batch of the per-frame lowering
    lowering = "plain" if divides_clips or platform == "cpu" else "platform"
    with lowered(lowering), shared_by_tpus(mesh.shape["data"] if platform == "tpu" and not divides_clips else 0):
        yield


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Replicates a tree over the devices of a mesh; all processes pass the same."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding(mesh))
    return jax.jit(lambda tree: tree, out_shardings=sharding(mesh))(tree)


def abstract_parts(shape: Sequence[int], mesh: Mesh, dtype: Any) -> Parts:
    """Returns the shapes and shardings of the parts of a clip (B, T, H, W, C), to compile for."""
    lengths = (1, shape[1] - 1) if is_split(shape[1], mesh) else (shape[1],)
    return tuple(
        jax.ShapeDtypeStruct((shape[0], length, *shape[2:]), dtype, sharding=sharding(mesh, clip_spec(i > 0)))
        for i, length in enumerate(lengths)
    )


def is_split(frames: int, mesh: Mesh | None) -> bool:
    """Whether a clip of this many frames, or latents, is in two parts."""
    return mesh is not None and mesh.shape["time"] > 1 and frames > 1


def split_parts(clip: Any, mesh: Mesh | None) -> Parts:
    """Splits a clip (B, T, ...) into its parts."""
    return (clip[:, :1], clip[:, 1:]) if is_split(clip.shape[1], mesh) else (clip,)


def run_parts(module: nnx.Module, step: Step, parts: Parts, mesh: Mesh | None, chunk: int | None = None) -> Parts:
    """Returns what `step(module, clip, None)` returns, in parts, for the parts of a clip; inside a jit.

    With `chunk`, that many frames are computed at a time; time must not be sharded then.
    """
    if chunk is not None:
        return (scan_chunks(module, step, parts[0], chunk)[0],)
    if mesh is None or mesh.shape["time"] == 1:
        return (step(module, parts[0], None)[0],)
    result, carry = step(module, per_device_copies(parts[0], mesh), None)
    first = jax.tree.map(lambda leaf: pick_device(0, leaf, mesh), result)
    return (first, *(run_over_time(module, step, rest, carry, mesh)[0] for rest in parts[1:]))


def run_over_time(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns what `step(module, x, carry)` returns for frames x (B, T, H, W, C) that N devices of `time` share.

    The carry, before and after, has a copy for each device: (N * B, frames, H, W, C).
    """
    devices = mesh.shape["time"]
    # To the layers, each device's share is a clip of its own, (N * B, T / N, H, W, C). They ask the halo for the frames
    # before it: on device 0 those of the carry, otherwise the last ones of the devices before.
    carry = jax.tree.map(lambda leaf: TimeHalo(leaf, devices), carry)
    result, after = step(module, fold_time(x, mesh), carry)
    # each device returns the carry after its own frames; the stream's is that of the last device
    after = jax.tree.map(lambda leaf: per_device_copies(pick_device(devices - 1, leaf, mesh), mesh), after)
    return jax.tree.map(lambda leaf: unfold_time(leaf, mesh), result), after


def fold_time(x: Any, mesh: Mesh) -> Any:
    """Folds the N devices of `time` into the batch: (B, T, ...) becomes (N * B, T / N, ...), device by device."""
    x = jnp.moveaxis(x.reshape(x.shape[0], mesh.shape["time"], -1, *x.shape[2:]), 1, 0)
    return constrain(x.reshape(-1, *x.shape[2:]), mesh, FOLDED)


def unfold_time(x: Any, mesh: Mesh) -> Any:
    """Undoes `fold_time`."""
    x = jnp.moveaxis(x.reshape(mesh.shape["time"], -1, *x.shape[1:]), 0, 1)
    return constrain(x.reshape(x.shape[0], -1, *x.shape[3:]), mesh, clip_spec(True))


def constrain(x: Any, mesh: Mesh, spec: Spec) -> Any:
    """Constrains the sharding of x, of no more axes than the spec has, inside a jit."""
    return lax.with_sharding_constraint(x, sharding(mesh, Spec(*spec[: x.ndim])))


def per_device_copies(x: Any, mesh: Mesh) -> Any:
    """Returns (N * B, T, ...): a copy of (B, T, ...) for each of the N devices of `time`, as clips of their own.

    Were the clip replicated instead, XLA (of jax 0.10) would count the gradients of kernels once a device where height
    or width are sharded too.
    """
    x = jnp.broadcast_to(x, (mesh.shape["time"], *x.shape))
    return constrain(x.reshape(-1, *x.shape[2:]), mesh, FOLDED)


def pick_device(index: int, x: Any, mesh: Mesh) -> Any:
    """Returns (B, T, ...), on all devices of `time`: what the one at `index` holds of (N * B, T, ...)."""
    x = x.reshape(mesh.shape["time"], -1, *x.shape[1:])
    is_picked = (jnp.arange(len(x)) == index).reshape(-1, *(1,) * (x.ndim - 1))
    # a sum of one term and zeros is an all-reduce; for x[index] XLA would all-gather x
    return constrain(jnp.where(is_picked, x, jnp.zeros_like(x)).sum(axis=0), mesh, clip_spec(False))


def map_frames(function: Callable[..., jax.Array], *clips: jax.Array, mesh: Mesh | None, part: int) -> jax.Array:
    """Applies a per-frame function (LPIPS, say) to the parts number `part`, 0 or 1, of clips; returns (B, T).

    The function gets all frames of a device as one clip: (devices, frames of each, H, W, C) to (devices, frames).
    """
    if mesh is None:
        b, t = clips[0].shape[:2]
        return function(*(x.reshape(1, b * t, *x.shape[2:]) for x in clips)).reshape(b, t)
    fold, unfold = (fold_time, unfold_time) if part else (per_device_copies, partial(pick_device, 0))
    clips = tuple(fold(x, mesh) for x in clips)
    devices = mesh.shape["time"] * mesh.shape["data"]
    by_device = (x.reshape(devices, -1, *x.shape[2:]) for x in clips)
    result = function(*(constrain(x, mesh, FOLDED) for x in by_device))
    return unfold(result.reshape(clips[0].shape[:2]), mesh)
