"""`flax-vae reconstruct`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np

from flax_vae.cli.options import (
    PLAINLY,
    Clip,
    Frames,
    How,
    LossyTiles,
    MeasureTiles,
    Memory,
    Resume,
    Size,
    Video,
    Weights,
)
from flax_vae.io.files import IMAGES
from flax_vae.jobs.budget import chunk_latents, read_budget
from flax_vae.jobs.clip import Clip as Source
from flax_vae.jobs.clip import expected, open_clip
from flax_vae.jobs.frames import IMAGE, FramePieces, assemble, losses
from flax_vae.jobs.model import Model, check_stream, load, read_config
from flax_vae.jobs.pieces import run
from flax_vae.jobs.screen import Meter, counted, note, progress, table
from flax_vae.jobs.sources import check_frames_target, check_target, pairs


def reconstruct(
    video: Video,
    out: Clip,
    weights: Weights,
    size: Size = None,
    frames: Frames = None,
    memory: Memory = None,
    how: How = PLAINLY,
    resume: Resume = False,
    lossy_tiles: LossyTiles = False,
    measure_tiles: MeasureTiles = False,
) -> None:
    """Encodes and decodes a clip of any length, a chunk at a time, and shows what is lost on the way.

    Writes the clip, with its sound, to OUT.mp4 and a contact sheet (input, reconstruction, difference) to
    OUT_sheet.png beside it. Prints the PSNR, taken from the 8-bit frames before H.264 compresses them: about 30 dB and
    more is close, 10 dB noise. A clip whose frames are not 8k + 1 is filled by repeating its last frame; the repeats
    are cut off again.

    Example:
      flax-vae reconstruct clip.mp4 again.mp4 --weights my_vae --size 256 --frames 65
    """
    import matplotlib  # noqa: F401  # needed last of all, so a missing one would be noticed too late

    from flax_vae.jobs.job import check_begun

    if measure_tiles and not lossy_tiles:
        raise ValueError("--measure-tiles measures --lossy-tiles: give both")
    check_sheets(video)
    config, budget = read_config(weights), read_budget(memory)
    work = [(open_clip(path, config, size, frames), target) for path, target in pairs(video, out, IMAGE, resume)]
    check_stream(how.mesh, config, ((clip.height, clip.width) for clip, _ in work))
    for clip, target in work:
        note(clip.about)
        check_begun(target, resume)
        if not video.is_dir():
            check_frames_target(target, clip.path, 1 if clip.is_image else None)
            check_target(sheet_of(target), [".png"], clip.path)
    model = load(weights, how, lossy_tiles)
    if video.is_dir():
        out.mkdir(exist_ok=True)
    quality: list[float] = []
    with progress("reconstructing", expected(clip for clip, _ in work)) as meter:
        for clip, target in work:
            quality += reconstruct_clip(clip, target, model, budget, resume, meter)
    rows = [tiles_row(clip, model) for clip, _ in work[:1]] if measure_tiles else []
    if work:
        report(video, out, quality, meter, rows)


def reconstruct_clip(
    clip: Source, target: Path, model: Model, budget: int | None, resume: bool, meter: Meter
) -> list[float]:
    """Reconstructs one clip, or goes on with it, and gives the PSNR of its frames in dB."""
    from flax_vae.io.picture import contact_sheet, pooled_psnr
    from flax_vae.jobs.job import Job
    from flax_vae.runtime.stream import compiled

    step = compiled(MethodType(reconstruct_chunk, model.vae), model.mesh)
    settings = {"command": "reconstruct", **clip.source, "size": (clip.height, clip.width), **model.identity}
    with Job(target, settings, resume) as job:
        meter.already(job.progress.frames)
        if not job.progress.is_complete:
            latents = job.decision("chunk", lambda: chunk_latents(step, clip.shape, clip.expected_latents, budget))
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


def tiles_row(clip: Source, model: Model) -> tuple[str, str]:
    """Says how far the first frames in tiles are from those without, which takes the memory that tiles save."""
    import jax.numpy as jnp

    from flax_vae.runtime.tile import LossyTiling, lossy_psnr

    chunks = itertools.islice(clip.chunks(1), 3)
    frames = jnp.asarray(np.concatenate([chunk.data for chunk in chunks], axis=1))
    psnr = lossy_psnr(model.checkpoint, frames, LossyTiling(), clip.factor)
    return f"PSNR of lossy tiles against none, first {counted(frames.shape[1])}", f"{psnr:.2f} dB"


def report(video: Path, out: Path, quality: list[float], meter: Meter, more: Sequence[tuple[str, str]]) -> None:
    """Prints what was lost, and where to look."""
    worst = int(np.argmin(quality))
    rows = [
        ("PSNR, mean of the frames", f"{math.fsum(quality) / len(quality):.2f} dB"),
        ("PSNR, worst frame", f"{quality[worst]:.2f} dB (frame {worst})"),
        *more,
        ("speed", meter.pace()),
        ("written", str(out)),
        *([("contact sheet", str(sheet_of(out)))] if not video.is_dir() else []),
    ]
    table(f"{video}: {counted(len(quality))}", rows)
