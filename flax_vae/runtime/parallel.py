"""A clip on many devices: exactly the results of one. B batch, T frames, H W pixels, C channels.

XLA divides batch, height and width by itself, from where its inputs lie. Time is divided here: the first frame is a
part of its own, which every device of `time` computes; the frames after it are divided evenly. What a device has of
them is one more clip of the batch, but that it takes what came before from the devices before it (`FromNeighbour`).
So a clip on a mesh is a tuple of parts: the first frame and the rest where time is divided, else the clip as a whole.
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

from flax_vae.layers.scan import Step, checked_chunk, in_chunks
from flax_vae.layers.strips import shared_by_tpus
from flax_vae.layers.time_halo import FromNeighbour
from flax_vae.models.config import VAEConfig
from flax_vae.ops.geometry import latent_frames
from flax_vae.ops.window import lowered
from flax_vae.runtime.mesh import check_sizes, clip_spec, placed

Parts = tuple[Any, ...]
CUT = Spec(("time", "data"), None, "height", "width", None)  # of clips each of which is a device's share of one


def encode(vae: Any, video: Any, mesh: Mesh, chunk: int | None = None) -> Any:
    """Encodes (B, T, H, W, 3) on a mesh to what `vae.encode` gives; ValueError where the mesh does not divide it."""
    check_clip(vae.config, mesh, video.shape[:4], chunk)
    structure, state = nnx.split(vae)
    return joined(_run(structure, type(vae).encode_chunk, mesh, chunk, everywhere(state, mesh), put(video, mesh)))


def decode(vae: Any, latents: Any, mesh: Mesh, chunk: int | None = None) -> Any:
    """Decodes latents (B, t, h, w, z) on a mesh to what `vae.decode` gives, `chunk` latents at a time.

    Raises ValueError where the mesh does not divide them.
    """
    frames, height, width, _ = vae.config.video_shape(*latents.shape[1:4])
    check_clip(
        vae.config, mesh, (latents.shape[0], frames, height, width), chunk and chunk * vae.config.temporal_factor
    )
    structure, state = nnx.split(vae)
    return joined(_run(structure, type(vae).decode_chunk, mesh, chunk, everywhere(state, mesh), put(latents, mesh)))


def lower_encode(
    vae: Any, mesh: Mesh, shape: Sequence[int], chunk: int | None = None, dtype: Any = jnp.float32
) -> jax.stages.Lowered:
    """Gives the program that encodes clips of a shape (B, T, H, W) in pixels, `chunk` frames at a time."""
    check_clip(vae.config, mesh, shape, chunk)
    parts = abstract((*shape, vae.config.encoder_in_channels), mesh, dtype)
    return _lower(vae, mesh, type(vae).encode_chunk, chunk, parts)


def lower_decode(
    vae: Any, mesh: Mesh, shape: Sequence[int], chunk: int | None = None, dtype: Any = jnp.float32
) -> jax.stages.Lowered:
    """Gives the program that decodes to clips of a shape (B, T, H, W) in pixels, `chunk` frames at a time."""
    check_clip(vae.config, mesh, shape, chunk)
    latents = (shape[0], *vae.config.latent_shape(*shape[1:]))
    chunk = chunk and chunk // vae.config.temporal_factor
    return _lower(vae, mesh, type(vae).decode_chunk, chunk, abstract(latents, mesh, dtype))


def check_clip(config: VAEConfig, mesh: Mesh, shape: Sequence[int], chunk: int | None) -> None:
    """Raises ValueError unless the mesh divides clips of a shape (B, T, H, W), computed `chunk` frames at a time."""
    latent_frames(shape[1], config.temporal_factor)
    check_sizes(mesh.shape, config, *shape)
    one_by_one = chunk is not None or config.frame_by_frame
    if chunk is not None:
        checked_chunk(chunk, config.temporal_factor)
    if mesh.shape["time"] > 1 and one_by_one:
        raise ValueError(
            "chunks, and frame by frame, compute one after the other what time divides among devices: "
            f"take time=1 and divide height or width, or compute the clip as a whole (chunk={chunk})"
        )


def put(clip: Any, mesh: Mesh) -> Parts:
    """Places a clip (B, T, H, W, C) on a mesh, in parts; of several processes each gives its own clips of the batch."""
    parts = parts_of(np.asarray(clip) if jax.process_count() > 1 else clip, mesh)
    return tuple(_put(part, placed(mesh, clip_spec(i > 0))) for i, part in enumerate(parts))


def _put(part: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(part, sharding)
    return jax.make_array_from_process_local_data(sharding, part)


def put_step(chunk: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Places a chunk of a stream (B, T, H, W, C) and its carry on a mesh; of shapes, says where they lie."""
    specs = clip_spec(carry is not None), clip_spec(False)
    return tuple(
        jax.tree.map(partial(_placed, placed(mesh, spec)), x) for x, spec in zip((chunk, carry), specs, strict=True)
    )


def _placed(sharding, leaf):
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)


def step_on_mesh(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Gives what `step(module, x, carry)` gives of a chunk that `put_step` has placed; within a compiled program."""
    with traced_for(mesh):
        if carry is None or mesh.shape["time"] == 1:
            result, after = step(module, x, carry)
        else:
            carry = jax.tree.map(lambda leaf: copies(leaf, mesh), carry)
            result, after = over_time(module, step, x, carry, mesh)
            after = jax.tree.map(lambda leaf: one_copy(0, leaf, mesh), after)
    return result, lax.with_sharding_constraint(after, placed(mesh, clip_spec(False)))


@contextmanager
def traced_for(mesh: Mesh | None) -> Iterator[None]:
    """Within it layers are traced as suits the devices of a mesh: of TPUs that divide the batch alone, in strips."""
    if mesh is None:
        yield
        return
    divides_clips = mesh.size > mesh.shape["data"]
    platform = mesh.devices.flat[0].platform
    # XLA could not divide frames that are images with others, and not the batch of what a CPU computes by frames
    way = "plain" if divides_clips or platform == "cpu" else "platform"
    with lowered(way), shared_by_tpus(mesh.shape["data"] if platform == "tpu" and not divides_clips else 0):
        yield


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Places all of a tree on every device of a mesh; all processes give the same."""
    if jax.process_count() == 1:
        return jax.device_put(tree, placed(mesh))
    return jax.jit(lambda tree: tree, out_shardings=placed(mesh))(tree)


def abstract(shape: Sequence[int], mesh: Mesh, dtype: Any) -> Parts:
    """Gives the shapes and places of the parts of a clip (B, T, H, W, C), to compile for."""
    lengths = (1, shape[1] - 1) if is_divided(shape[1], mesh) else (shape[1],)
    return tuple(
        jax.ShapeDtypeStruct((shape[0], length, *shape[2:]), dtype, sharding=placed(mesh, clip_spec(i > 0)))
        for i, length in enumerate(lengths)
    )


def is_divided(frames: int, mesh: Mesh | None) -> bool:
    """Tells whether a clip of so many frames, or latents, is in two parts."""
    return mesh is not None and mesh.shape["time"] > 1 and frames > 1


def parts_of(clip: Any, mesh: Mesh | None) -> Parts:
    """Cuts a clip (B, T, ...) into its parts."""
    return (clip[:, :1], clip[:, 1:]) if is_divided(clip.shape[1], mesh) else (clip,)


def joined(parts: Sequence[Any]) -> Any:
    """Joins the parts of a clip, or trees of such, in time."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def in_parts(module: nnx.Module, step: Step, parts: Parts, mesh: Mesh | None, chunk: int | None = None) -> Parts:
    """Gives what `step(module, clip, None)` gives of the parts of a clip, in parts; within a compiled program."""
    if chunk is not None:
        return (in_chunks(module, step, parts[0], chunk)[0],)
    if mesh is None or mesh.shape["time"] == 1:
        return (step(module, parts[0], None)[0],)
    result, carry = step(module, copies(parts[0], mesh), None)
    first = jax.tree.map(lambda leaf: one_copy(0, leaf, mesh), result)
    return (first, *(over_time(module, step, rest, carry, mesh)[0] for rest in parts[1:]))


def over_time(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Gives what `step(module, x, carry)` gives of frames (B, T, H, W, C) that are divided over `time`.

    What a device has of a clip is a clip of its own: (B, T) become (devices * B, T / devices). Of the carry, each
    device has a copy, before and after.
    """
    devices = mesh.shape["time"]
    carry = jax.tree.map(lambda leaf: FromNeighbour(leaf, devices), carry)
    result, after = step(module, own_frames(x, mesh), carry)
    after = jax.tree.map(lambda leaf: copies(one_copy(devices - 1, leaf, mesh), mesh), after)
    return jax.tree.map(lambda leaf: joined_again(leaf, mesh), result), after


def own_frames(x: Any, mesh: Mesh) -> Any:
    """Makes what each device of `time` has of (B, T, ...) a clip of its own: (devices * B, T / devices, ...)."""
    x = jnp.moveaxis(x.reshape(x.shape[0], mesh.shape["time"], -1, *x.shape[2:]), 1, 0)
    return on_mesh(x.reshape(-1, *x.shape[2:]), mesh, CUT)


def joined_again(x: Any, mesh: Mesh) -> Any:
    """Undoes `own_frames`."""
    x = jnp.moveaxis(x.reshape(mesh.shape["time"], -1, *x.shape[1:]), 0, 1)
    return on_mesh(x.reshape(x.shape[0], -1, *x.shape[3:]), mesh, clip_spec(True))


def on_mesh(x: Any, mesh: Mesh, spec: Spec) -> Any:
    """Places (B, T, ...), of as many axes as there are, within a compiled program."""
    return lax.with_sharding_constraint(x, placed(mesh, Spec(*spec[: x.ndim])))


def copies(x: Any, mesh: Mesh) -> Any:
    """Gives every device of `time` a copy of (B, T, H, W, C), as a clip of its own: (devices * B, T, H, W, C).

    Were the clip simply on all of them, XLA (of jax 0.10) would count the gradients of kernels once a device where
    height or width are divided too.
    """
    x = jnp.broadcast_to(x, (mesh.shape["time"], *x.shape))
    return on_mesh(x.reshape(-1, *x.shape[2:]), mesh, CUT)


def one_copy(place: int, x: Any, mesh: Mesh) -> Any:
    """Gives all devices of `time` what the one at a place has of (devices * B, T, H, W, C)."""
    devices = mesh.shape["time"]
    x = x.reshape(devices, -1, *x.shape[1:])
    is_there = (jnp.arange(devices) == place).reshape(-1, *(1,) * (x.ndim - 1))
    x = jnp.where(is_there, x, jnp.zeros_like(x)).sum(axis=0)  # not x[place], for which XLA would gather all of x
    return on_mesh(x, mesh, clip_spec(False))


def of_frames(function: Callable[..., jax.Array], *clips: jax.Array, mesh: Mesh | None, part: int) -> jax.Array:
    """Gives `function(*clips)`, of shape (B, T), of what judges each frame by itself, whatever clip it is of.

    The clips are the parts of one number, 0 or 1, of clips on the mesh. The function gets all frames that a device has
    as one clip: (devices, frames of each, H, W, C).
    """
    if mesh is None:
        b, t = clips[0].shape[:2]
        return function(*(x.reshape(1, b * t, *x.shape[2:]) for x in clips)).reshape(b, t)
    own, whole = (own_frames, joined_again) if part else (copies, partial(one_copy, 0))
    clips = tuple(own(x, mesh) for x in clips)
    devices = mesh.shape["time"] * mesh.shape["data"]
    by_device = (x.reshape(devices, -1, *x.shape[2:]) for x in clips)
    result = function(*(on_mesh(x, mesh, CUT) for x in by_device))
    return whole(result.reshape(clips[0].shape[:2]), mesh)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(structure, step, mesh, chunk, state, parts):
    with traced_for(mesh):
        return in_parts(nnx.merge(structure, state), step, parts, mesh, chunk)


def _lower(vae, mesh, step, chunk, parts):
    structure, state = nnx.split(vae)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(mesh)), state)
    return _run.lower(structure, step, mesh, chunk, state, parts)
