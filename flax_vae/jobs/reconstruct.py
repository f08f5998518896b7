"""Encodes and decodes clips of any length, a chunk at a time, and measures what is lost."""

import itertools
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import jax.numpy as jnp
import matplotlib  # noqa: F401  # needed by the contact sheet, at the end, where a missing one would be noticed too late
import numpy as np

from flax_vae.io.files import IMAGES
from flax_vae.io.finite import computed_of
from flax_vae.jobs.budget import chunk_latents
from flax_vae.jobs.clip import Clip, expected_frames
from flax_vae.jobs.frames import IMAGE, assemble, losses, write_piece
from flax_vae.jobs.job import Job
from flax_vae.jobs.model import Model, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import run
from flax_vae.jobs.screen import Meter, counted, progress
from flax_vae.jobs.sources import Attempts, check_frames_target, check_target, chunks_of, open_clips, source_of
from flax_vae.metrics.contact_sheet import contact_sheet
from flax_vae.metrics.psnr import pooled_psnr, psnr
from flax_vae.models.vae import VideoVAE
from flax_vae.runtime.stream import compiled
from flax_vae.runtime.tile import LossyTiles


@dataclass(frozen=True)
class Reconstruction:
    """The PSNR of every frame of every clip in dB, how fast it went, and, as a row of a table, what tiles have lost.

    `attempts` are the images of a folder that could be done and those that could not.
    """

    quality: list[float]
    meter: Meter
    tiles: list[tuple[str, str]]
    attempts: Attempts


def reconstruct(video: Path, out: Path, weights: str, options: Options, measure_tiles: bool = False) -> Reconstruction:
    """Reconstructs a clip, with its sound and a contact sheet beside it, or every image of a folder.

    Args:
      video: a clip, or a folder of images.
      out: the video or image to write, or the folder of images.
      weights: a checkpoint.
      options: how to read and compute.
      measure_tiles: whether to compute the first frames without tiles too, in the memory that tiles save.
    """
    if measure_tiles and not options.lossy_tiles:
        raise ValueError("--measure-tiles measures --lossy-tiles: give both")
    check_sheets(video)
    work, attempts = open_clips(video, out, IMAGE, read_config(weights), options)
    for clip, target in work if not video.is_dir() else ():
        check_frames_target(target, clip.path, 1 if clip.is_image else None)
        check_target(sheet_of(target), [".png"], clip.path)
    model = load(weights, options)
    quality: list[float] = []
    done: list[Clip] = []
    with progress("reconstructing", expected_frames(clip for clip, _ in work)) as meter:
        for clip, target in work:
            with attempts.attempt(clip.path):
                quality += reconstruct_clip(clip, target, model, options, meter)
                done.append(clip)
    tiles = [tiles_row(clip, model) for clip in done[:1]] if measure_tiles else []
    return Reconstruction(quality, meter, tiles, attempts)


def reconstruct_clip(clip: Clip, target: Path, model: Model, options: Options, meter: Meter) -> list[float]:
    """Reconstructs one clip, or goes on with it; returns the PSNR of its frames in dB."""
    step = compiled(MethodType(reconstruct_chunk, model.vae), model.mesh)
    settings = {"command": "reconstruct", **source_of(clip), "size": (clip.height, clip.width), **model.identity}
    with computed_of(clip.path), Job(target, settings, options.resume) as job:
        asked = model.mesh, clip.shape, clip.expected_latents
        size = job.decision("chunk", lambda: chunk_latents(step, *asked, options.budget))
        write = partial(write_piece, job, clip.fps, clip.height, clip.width)
        run(job, step, chunks_of(clip, size, job.progress.frames), write, meter)
        quality, numbers, before, after = losses(job)
        sheet = job.folder / "sheet.png"
        contact_sheet(sheet, before, after, clip.path.name, numbers, pooled_psnr(quality))
        os.replace(sheet, sheet_of(target))
        assemble(job, clip.fps, clip.path if clip.has_sound else None)
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
    """Returns the path of the contact sheet beside a clip."""
    return target.with_name(f"{target.stem}_sheet.png")


def tiles_row(clip: Clip, model: Model) -> tuple[str, str]:
    """Returns a row that says how close the first frames in tiles are to those without."""
    chunks = itertools.islice(clip.chunks(1), 3)
    frames = jnp.asarray(np.concatenate([chunk.data for chunk in chunks], axis=1))
    quality = lossy_psnr(model.checkpoint, model.vae, frames, clip.config.temporal_factor)
    return f"PSNR of lossy tiles against none, first {counted(frames.shape[1])}", f"{quality:.2f} dB"


def lossy_psnr(vae: VideoVAE, tiles: VideoVAE | LossyTiles, video: Any, chunk: int | None = None) -> float:
    """Returns the PSNR in dB of a reconstruction in lossy tiles against one without; inf where equal.

    Args:
      vae: the model.
      tiles: the same model, in tiles.
      video: (B, T, H, W, C) in [-1, 1].
      chunk: frames at a time; without tiles, these take the memory that tiles save.
    """
    latents = chunk and chunk // vae.config.temporal_factor
    return psnr(*(m.decode(m.encode(video, chunk).mode(), latents) for m in (tiles, vae)))
