"""Encodes and decodes whole clips on a mesh of devices: B batch, T frames, H W pixels, C channels."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flax_vae.models.posterior import DiagonalGaussian, Latents
from flax_vae.models.vae import Video, VideoVAE
from flax_vae.runtime.mesh import check_sizes, sharding
from flax_vae.runtime.parallel import abstract_parts, lowered_for, replicate, run_parts, shard


def encode(vae: VideoVAE, video: Video, mesh: Mesh, chunk: int | None = None) -> DiagonalGaussian:
    """Encodes clips on a mesh; returns what `vae.encode` returns.

    Args:
      vae: a model.
      video: (B, T, H, W, C), pixels in [-1, 1].
      mesh: devices that share the clips (`flax_vae.make_mesh`).
      chunk: frames to compute at a time; None is all of them.

    Raises:
      ValueError: the mesh does not divide the clips evenly, or time and chunks at once.
    """
    check_clip(vae, mesh, video.shape[:4], chunk)
    return _compute(vae, type(vae).encode_chunk, video, mesh, chunk)


def decode(vae: VideoVAE, latents: Latents, mesh: Mesh, chunk: int | None = None) -> Video:
    """Decodes latents (B, t, h, w, z) on a mesh; returns what `vae.decode` returns.

    Arguments and errors are those of `encode`; `chunk` counts latents.
    """
    frames, height, width, _ = vae.config.video_shape(*latents.shape[1:4])
    check_clip(vae, mesh, (latents.shape[0], frames, height, width), chunk and vae.config.chunk_frames(chunk))
    return _compute(vae, type(vae).decode_chunk, latents, mesh, chunk)


def lower(
    job: Literal["encode", "decode"],
    vae: VideoVAE,
    mesh: Mesh,
    shape: Sequence[int],
    chunk: int | None = None,
    dtype: Any = jnp.float32,
) -> jax.stages.Lowered:
    """Lowers the program that encodes clips of a shape (B, T, H, W) in pixels, or decodes to them.

    The model may be abstract, `dtype` is that of pixels or latents, and `chunk` counts frames. Errors are `encode`'s.
    """
    check_clip(vae, mesh, shape, chunk)
    config = vae.config
    if job == "encode":
        step, clip = type(vae).encode_chunk, (*shape, config.pixel_channels)
    else:
        step, clip = type(vae).decode_chunk, (shape[0], *config.latent_shape(*shape[1:]))
        chunk = chunk and chunk // config.temporal_factor
    structure, state = nnx.split(vae)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh)), state)
    return _run.lower(structure, step, mesh, chunk, state, abstract_parts(clip, mesh, dtype))


def check_clip(vae: VideoVAE, mesh: Mesh, shape: Sequence[int], chunk: int | None) -> None:
    """Raises ValueError unless the mesh divides clips of a shape (B, T, H, W), computed `chunk` frames at a time."""
    vae.config.latent_frames(shape[1])
    check_sizes(mesh.shape, vae.config, *shape)
    if chunk is not None:
        vae.config.checked_chunk(chunk)
    if mesh.shape["time"] > 1 and (chunk is not None or vae.execution.frame_by_frame):
        raise ValueError(
            "chunks, and frame by frame, compute one after the other what time divides among devices: "
            f"take time=1 and divide height or width, or compute the clip as a whole (chunk={chunk})"
        )


def _compute(vae, step, clip, mesh, chunk):
    structure, state = nnx.split(vae)
    parts = _run(structure, step, mesh, chunk, replicate(state, mesh), shard(clip, mesh))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(structure, step, mesh, chunk, state, parts):
    with lowered_for(mesh):
        return run_parts(nnx.merge(structure, state), step, parts, mesh, chunk)
