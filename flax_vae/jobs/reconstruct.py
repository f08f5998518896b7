"""Encodes and decodes clips of any length, a chunk at a time, and measures what is lost."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vae.io.files import IMAGES
from flax_vae.jobs.budget import chunk_latents
from flax_vae.jobs.clip import Clip, expected, open_clip
from flax_vae.jobs.frames import IMAGE, FramePieces, assemble, losses
from flax_vae.jobs.model import Model, check_stream, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import run
from flax_vae.jobs.screen import Meter, counted, note, progress
from flax_vae.jobs.sources import check_frames_target, check_target, pairs

if TYPE_CHECKING:
    from flax_vae.models.vae import VideoVAE
    from flax_vae.runtime.tile import LossyTiles


@dataclass(frozen=True)
class Reconstruction:
    """The PSNR of every frame of every clip in dB, how fast it went, and, as a row of a table, what tiles have lost."""

    quality: list[float]
    meter: Meter
    tiles: list[tuple[str, str]]


def reconstruct(video: Path, out: Path, weights: str, options: Options, measure_tiles: bool = False) -> Reconstruction:
    """Reconstructs a clip, with its sound and a contact sheet beside it, or every image of a folder."""
    import matplotlib  # noqa: F401  # needed last of all, so a missing one would be noticed too late

    from flax_vae.jobs.job import check_begun

    if measure_tiles and not options.lossy_tiles:
        raise ValueError("--measure-tiles measures --lossy-tiles: give both")
    check_sheets(video)
    config = read_config(weights)
    work = [
        (open_clip(path, config, options.size, options.frames), target)
        for path, target in pairs(video, out, IMAGE, options.resume)
    ]
    check_stream(options.mesh, config, ((clip.height, clip.width) for clip, _ in work))
    for clip, target in work:
        note(clip.about)
        check_begun(target, options.resume)
        if not video.is_dir():
            check_frames_target(target, clip.path, 1 if clip.is_image else None)
            check_target(sheet_of(target), [".png"], clip.path)
    model = load(weights, options)
    if video.is_dir():
        out.mkdir(exist_ok=True)
    quality: list[float] = []
    with progress("reconstructing", expected(clip for clip, _ in work)) as meter:
        for clip, target in work:
            quality += reconstruct_clip(clip, target, model, options, meter)
    return Reconstruction(quality, meter, [tiles_row(clip, model) for clip, _ in work[:1]] if measure_tiles else [])


def reconstruct_clip(clip: Clip, target: Path, model: Model, options: Options, meter: Meter) -> list[float]:
    """Reconstructs one clip, or goes on with it; returns the PSNR of its frames in dB."""
    from flax_vae.jobs.job import Job
    from flax_vae.metrics.contact_sheet import contact_sheet
    from flax_vae.metrics.psnr import pooled_psnr
    from flax_vae.runtime.stream import compiled

    step = compiled(MethodType(reconstruct_chunk, model.vae), model.mesh)
    settings = {"command": "reconstruct", **clip.source, "size": (clip.height, clip.width), **model.identity}
    with Job(target, settings, options.resume) as job:
        meter.already(job.progress.frames)
        if not job.progress.is_complete:
            latents = job.decision(
                "chunk", lambda: chunk_latents(step, clip.shape, clip.expected_latents, options.budget)
            )
            pieces = FramePieces(job, target, clip.fps, clip.height, clip.width)
            run(job, step, clip.chunks(latents, job.progress.frames), pieces, meter)
        quality, numbers, before, after = losses(job)
        sheet = job.folder / "sheet.png"
        contact_sheet(sheet, before, after, clip.path.name, numbers, pooled_psnr(quality))
        os.replace(sheet, sheet_of(target))
        assemble(job, target, clip.fps, clip.path if clip.has_sound else None)
    clip.report(job.progress.frames)
    return quality


def reconstruct_chunk(vae: Any, x: Any, carry: Any = None) -> tuple[Any, Any]:
    """Encodes a chunk and decodes the means: a step whose carry is that of both."""
    encoding, decoding = (None, None) if carry is None else carry
    posterior, encoding = vae.encode_chunk(x, encoding)
    video, decoding = vae.decode_chunk(posterior.mean, decoding)
    return video, (encoding, decoding)


def check_sheets(video: Path) -> None:
    """Raises ValueError where the sheet of one image of a folder would have the name of another image."""
    names = {path.stem for path in (video.iterdir() if video.is_dir() else ()) if path.suffix.lower() in IMAGES}
    if twice := sorted(name for name in names if f"{name}_sheet" in names):
        raise ValueError(f"{video}: the sheets of {', '.join(twice)} would be named as other images; rename those")


def sheet_of(target: Path) -> Path:
    """Gives the path of the contact sheet beside a clip."""
    return target.with_name(f"{target.stem}_sheet.png")


def tiles_row(clip: Clip, model: Model) -> tuple[str, str]:
    """Says how far the first frames in tiles are from those without, which takes the memory that tiles save."""
    import jax.numpy as jnp

    chunks = itertools.islice(clip.chunks(1), 3)
    frames = jnp.asarray(np.concatenate([chunk.data for chunk in chunks], axis=1))
    psnr = lossy_psnr(model.checkpoint, model.vae, frames, clip.config.temporal_factor)
    return f"PSNR of lossy tiles against none, first {counted(frames.shape[1])}", f"{psnr:.2f} dB"


def lossy_psnr(vae: VideoVAE, tiles: VideoVAE | LossyTiles, video: Any, chunk: int | None = None) -> float:
    """Returns in dB how close a video encoded and decoded in lossy tiles is to that without tiles; inf where equal.

    Both are computed, `chunk` frames at a time; without tiles, that takes the memory that tiles save.
    """
    from flax_vae.metrics.psnr import psnr

    latents = chunk and chunk // vae.config.temporal_factor
    return psnr(*(m.decode(m.encode(video, chunk).mode(), latents) for m in (tiles, vae)))
