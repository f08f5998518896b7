"""A clip on many devices: exactly the results of one. B batch, T frames, H W pixels, C channels.

XLA divides batch, height and width by itself, from where its inputs lie. Time is divided here: the first frame is a
part of its own, which all devices of `time` compute; the frames after it are divided evenly, each device taking what
came before its own from the devices before it (`FromNeighbour`). So a clip on a mesh is a tuple of parts: the first
frame and the rest where time is divided, else the clip as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from flax_vae.layers.chunks import Step, checked_chunk, in_chunks
from flax_vae.layers.geometry import latent_frames
from flax_vae.layers.lowering import lowered
from flax_vae.layers.neighbour import FromNeighbour
from flax_vae.models.config import VAEConfig
from flax_vae.models.vae import CausalVideoVAE
from flax_vae.runtime.mesh import check_sizes, clip_spec, placed

Parts = tuple[Any, ...]


def encode(vae: CausalVideoVAE, video: Any, mesh: Mesh, chunk: int | None = None) -> Any:
    """Encodes (B, T, H, W, 3) on a mesh to what `vae.encode` gives; ValueError where the mesh does not divide it."""
    check_clip(vae.config, mesh, video.shape[:4], chunk)
    structure, state = nnx.split(vae)
    return joined(_run(structure, CausalVideoVAE.encode_chunk, mesh, chunk, everywhere(state, mesh), put(video, mesh)))


def decode(vae: CausalVideoVAE, latents: Any, mesh: Mesh, chunk: int | None = None) -> Any:
    """Decodes latents (B, t, h, w, z) on a mesh to what `vae.decode` gives, `chunk` latents at a time.

    Raises ValueError where the mesh does not divide them.
    """
    frames, height, width, _ = vae.config.video_shape(*latents.shape[1:4])
    check_clip(
        vae.config, mesh, (latents.shape[0], frames, height, width), chunk and chunk * vae.config.temporal_factor
    )
    structure, state = nnx.split(vae)
    return joined(
        _run(structure, CausalVideoVAE.decode_chunk, mesh, chunk, everywhere(state, mesh), put(latents, mesh))
    )


def lower_encode(
    vae: CausalVideoVAE, mesh: Mesh, shape: Sequence[int], chunk: int | None = None, dtype: Any = jnp.float32
) -> jax.stages.Lowered:
    """Gives the program that encodes clips of a shape (B, T, H, W) in pixels, `chunk` frames at a time."""
    check_clip(vae.config, mesh, shape, chunk)
    parts = abstract((*shape, vae.config.encoder_in_channels), mesh, dtype)
    return _lower(vae, mesh, CausalVideoVAE.encode_chunk, chunk, parts)


def lower_decode(
    vae: CausalVideoVAE, mesh: Mesh, shape: Sequence[int], chunk: int | None = None, dtype: Any = jnp.float32
) -> jax.stages.Lowered:
    """Gives the program that decodes to clips of a shape (B, T, H, W) in pixels, `chunk` frames at a time."""
    check_clip(vae.config, mesh, shape, chunk)
    latents = (shape[0], *vae.config.latent_shape(*shape[1:]))
    chunk = chunk and chunk // vae.config.temporal_factor
    return _lower(vae, mesh, CausalVideoVAE.decode_chunk, chunk, abstract(latents, mesh, dtype))


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
    results, carry = [], None
    for part in parts:
        result, carry = step(module, part, None) if carry is None else over_time(module, step, part, carry, mesh)
        results.append(result)
    return tuple(results)


def over_time(module: nnx.Module, step: Step, x: Any, carry: Any, mesh: Mesh | None) -> tuple[Any, Any]:
    """Gives what `step(module, x, carry)` gives of frames (B, T, H, W, C) that are divided over `time`."""
    if mesh is None or mesh.shape["time"] == 1:
        return step(module, x, carry)
    structure, state = nnx.split(module)
    divided = Spec(None, "time")

    def run(state, x, carry):
        carry = jax.tree.map(lambda leaf: FromNeighbour(leaf, "time"), carry)
        result, after = step(nnx.merge(structure, state), x, carry)
        return result, jax.tree.map(_of_last, after)

    return divided_over(mesh, {"time"}, (Spec(), divided, Spec()), (divided, Spec()))(run)(state, x, carry)


def divided_over(mesh: Mesh, axes: set[str], inputs: Any, outputs: Any) -> Callable:
    """Gives a decorator for what each device of these axes computes by itself; XLA divides it over the others."""
    # Without the check, as the gradients of convolutions do not say over which axes they vary.
    return partial(jax.shard_map, mesh=mesh, axis_names=axes, in_specs=inputs, out_specs=outputs, check_vma=False)


def of_frames(function: Callable[..., jax.Array], weights: Any, *clips: jax.Array, mesh: Mesh | None, part: int) -> Any:
    """Gives `function(weights, *clips)`, of shape (B, T), each device computing it of the frames that it has.

    The clips are the parts of one number, 0 or 1, of clips on the mesh.
    """
    if mesh is None:
        return function(weights, *clips)
    divided = Spec("data", "time") if part else Spec("data")
    axes = {"data", "time"} if part else {"data"}
    places = (Spec(), *(divided for _ in clips))
    return divided_over(mesh, axes, places, divided)(function)(weights, *clips)


def _of_last(leaf: jax.Array) -> jax.Array:
    """Gives every device what the last one of `time` has."""
    is_last = lax.axis_index("time") == lax.axis_size("time") - 1
    return lax.psum(jnp.where(is_last, leaf, jnp.zeros_like(leaf)), "time")


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(structure, step, mesh, chunk, state, parts):
    with lowered("plain"):  # by frames, XLA could not divide the batch
        return in_parts(nnx.merge(structure, state), step, parts, mesh, chunk)


def _lower(vae, mesh, step, chunk, parts):
    structure, state = nnx.split(vae)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(mesh)), state)
    return _run.lower(structure, step, mesh, chunk, state, parts)
