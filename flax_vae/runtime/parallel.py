"""A clip sharded over a mesh: exactly the results of one device. B batch, T frames, H W pixels, C channels.

XLA's partitioner shards batch, height and width by itself, from how its inputs are sharded. Time is sharded here: the
first frame is a part of its own, which every device of `time` computes; the frames after it are divided evenly. The
share of a device is one more clip of the batch, whose carry is a `TimeHalo` from the devices before it. So a clip on a
mesh is a tuple of parts: the first frame and the rest where time is sharded, otherwise the clip as a whole.
"""

from __future__ import annotations

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
FOLDED = Spec(("time", "data"), None, "height", "width", None)  # of clips each of which is a device's share of one


def shard(clip: Any, mesh: Mesh) -> Parts:
    """Shards a clip (B, T, H, W, C) over a mesh, in parts; each of several processes gives its own clips."""
    parts = split_parts(np.asarray(clip) if jax.process_count() > 1 else clip, mesh)
    return tuple(_shard(part, sharding(mesh, clip_spec(i > 0))) for i, part in enumerate(parts))


def _shard(part: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(part, sharding)
    return jax.make_array_from_process_local_data(sharding, part)


def shard_step(chunk: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Shards a chunk of a stream (B, T, H, W, C) and its carry; to shapes, it adds their shardings."""
    specs = clip_spec(carry is not None), clip_spec(False)
    return tuple(
        jax.tree.map(partial(_shard_leaf, sharding(mesh, spec)), x)
        for x, spec in zip((chunk, carry), specs, strict=True)
    )


def _shard_leaf(sharding, leaf):
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)


def run_step(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns what `step(module, x, carry)` returns for a chunk that `shard_step` has sharded; inside a jit."""
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
    """Within it layers are traced as suits the devices of a mesh: on TPUs that divide the batch alone, in strips."""
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
    """Replicates a tree over the devices of a mesh; all processes give the same."""
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
    """Whether a clip of so many frames, or latents, is in two parts."""
    return mesh is not None and mesh.shape["time"] > 1 and frames > 1


def split_parts(clip: Any, mesh: Mesh | None) -> Parts:
    """Splits a clip (B, T, ...) into its parts."""
    return (clip[:, :1], clip[:, 1:]) if is_split(clip.shape[1], mesh) else (clip,)


def join_parts(parts: Sequence[Any]) -> Any:
    """Joins the parts of a clip, or trees of such, in time."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def run_parts(module: nnx.Module, step: Step, parts: Parts, mesh: Mesh | None, chunk: int | None = None) -> Parts:
    """Returns what `step(module, clip, None)` returns for the parts of a clip, in parts; inside a jit."""
    if chunk is not None:
        return (scan_chunks(module, step, parts[0], chunk)[0],)
    if mesh is None or mesh.shape["time"] == 1:
        return (step(module, parts[0], None)[0],)
    result, carry = step(module, per_device_copies(parts[0], mesh), None)
    first = jax.tree.map(lambda leaf: pick_device(0, leaf, mesh), result)
    return (first, *(run_over_time(module, step, rest, carry, mesh)[0] for rest in parts[1:]))


def run_over_time(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns what `step(module, x, carry)` returns for frames (B, T, H, W, C) that are sharded over `time`.

    To the layers, the share of each of the N devices is a clip of its own: (B, T) become (N * B, T / N). Each device
    has a copy of the carry, before and after.
    """
    devices = mesh.shape["time"]
    carry = jax.tree.map(lambda leaf: TimeHalo(leaf, devices), carry)
    result, after = step(module, fold_time(x, mesh), carry)
    # the carry of the stream is that of its last frames, which the last device has
    after = jax.tree.map(lambda leaf: per_device_copies(pick_device(devices - 1, leaf, mesh), mesh), after)
    return jax.tree.map(lambda leaf: unfold_time(leaf, mesh), result), after


def fold_time(x: Any, mesh: Mesh) -> Any:
    """Folds the devices of `time` into the batch: (B, T, ...) becomes (N * B, T / N, ...), device by device."""
    x = jnp.moveaxis(x.reshape(x.shape[0], mesh.shape["time"], -1, *x.shape[2:]), 1, 0)
    return constrain(x.reshape(-1, *x.shape[2:]), mesh, FOLDED)


def unfold_time(x: Any, mesh: Mesh) -> Any:
    """Undoes `fold_time`."""
    x = jnp.moveaxis(x.reshape(mesh.shape["time"], -1, *x.shape[1:]), 0, 1)
    return constrain(x.reshape(x.shape[0], -1, *x.shape[3:]), mesh, clip_spec(True))


def constrain(x: Any, mesh: Mesh, spec: Spec) -> Any:
    """Constrains the sharding of (B, T, ...), of as many axes as there are, inside a jit."""
    return lax.with_sharding_constraint(x, sharding(mesh, Spec(*spec[: x.ndim])))


def per_device_copies(x: Any, mesh: Mesh) -> Any:
    """Returns a copy of (B, T, H, W, C) for each of the N devices of `time`, as clips of their own: (N * B, T, ...).

    Were the clip replicated instead, XLA (of jax 0.10) would count the gradients of kernels once a device where height
    or width are sharded too.
    """
    x = jnp.broadcast_to(x, (mesh.shape["time"], *x.shape))
    return constrain(x.reshape(-1, *x.shape[2:]), mesh, FOLDED)


def pick_device(place: int, x: Any, mesh: Mesh) -> Any:
    """Returns on all devices of `time` what the one at a place has of (N * B, T, H, W, C)."""
    devices = mesh.shape["time"]
    x = x.reshape(devices, -1, *x.shape[1:])
    is_there = (jnp.arange(devices) == place).reshape(-1, *(1,) * (x.ndim - 1))
    x = jnp.where(is_there, x, jnp.zeros_like(x)).sum(axis=0)  # not x[place], for which XLA would gather all of x
    return constrain(x, mesh, clip_spec(False))


def map_frames(function: Callable[..., jax.Array], *clips: jax.Array, mesh: Mesh | None, part: int) -> jax.Array:
    """Applies a per-frame function (LPIPS, say); returns (B, T).

    `clips` are the parts number `part` (0 or 1) of clips on the mesh. The function gets all frames of a device as one
    clip: (devices, frames of each, H, W, C).
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
