"""Encodes clips of any length to latents on disk, a chunk at a time."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flax_vae.families.registry import released_scaling
from flax_vae.io.files import read_json
from flax_vae.io.finite import computed_of
from flax_vae.io.latents import SUFFIX, About, write_latents
from flax_vae.io.video.frame_times import join_times, uneven
from flax_vae.jobs.budget import chunk_latents
from flax_vae.jobs.clip import Clip, expected_frames
from flax_vae.jobs.job import Job
from flax_vae.jobs.model import Model, config_hash, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import Results, run
from flax_vae.jobs.screen import Meter, progress
from flax_vae.jobs.sources import Attempts, check_folder, chunks_of, open_clips, source_of
from flax_vae.models.latents import LatentScaling
from flax_vae.runtime.stream import compiled


def encode(
    video: Path, out: Path, weights: str, options: Options, scaling: str | None = None
) -> tuple[Meter, Attempts]:
    """Encodes a clip to a folder of latents, or every image of a folder.

    Args:
      video: a clip, or a folder of images.
      out: the folder to write, or the folder of the folders.
      weights: a checkpoint.
      options: how to read and compute.
      scaling: statistics to note beside the latents: a released variant, or a file of `extract`.

    Returns:
      How far and fast it went, and which images of a folder could not be done.
    """
    statistics = read_scaling(scaling)
    check_folder(out)
    work, attempts = open_clips(video, out, "", read_config(weights), options)
    for _, target in work:
        check_latents_alone(target)
    model = load(weights, options)
    with progress("encoding", expected_frames(clip for clip, _ in work)) as meter:
        for clip, target in work:
            with attempts.attempt(clip.path):
                clip.report(encode_clip(clip, target, model, options, meter, statistics))
    return meter, attempts


def encode_clip(
    clip: Clip, target: Path, model: Model, options: Options, meter: Meter, scaling: dict[str, Any] | None = None
) -> int:
    """Encodes one clip to a folder of latents, or goes on with it; returns the number of its frames.

    Raises ValueError for what is wrong with the clip, OSError where the latents cannot be written.
    """
    about, step = about_latents(clip, model, scaling), compiled(model.vae.encode_chunk, model.mesh)
    settings = {"command": "encode", **source_of(clip), **model.identity, "about": about}
    with computed_of(clip.path), Job(target, settings, options.resume) as job:
        asked = model.mesh, clip.shape, clip.expected_latents
        size = job.decision("chunk", lambda: chunk_latents(step, *asked, options.budget))
        run(job, step, chunks_of(clip, size, job.progress.frames), partial(write_piece, job, about), meter)
        job.become()
    return job.progress.frames


def about_latents(clip: Clip, model: Model, scaling: dict[str, Any] | None = None) -> About:
    """Returns what the latents of a clip say of it."""
    return About(clip.height, clip.width, clip.fps, config_hash(model.vae.config), model.weights, scaling)


def write_piece(job: Job, about: About, results: Results) -> None:
    """Writes the distributions of the latents of a piece, without padding, to a file."""
    parts, frames, times, is_last = [], 0, [], False
    for chunk, posterior in results:
        parts.append([np.asarray(x, np.float32)[:, : chunk.latents] for x in (posterior.mean, posterior.logvar)])
        frames, is_last = frames + chunk.frames, chunk.is_last
        times.append(chunk.times)
    mean, logvar = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    times = uneven(join_times(times), about.fps, job.progress.frames)
    write_latents(job.piece(SUFFIX), about, mean, logvar, frames, job.progress.latents, is_last, times)


def read_scaling(scaling: str | None) -> dict[str, Any] | None:
    """Returns the statistics of a released variant, or those in a file; ValueError where it holds none."""
    if scaling is None:
        return None
    if not Path(scaling).is_file():
        return released_scaling(scaling).to_dict()
    try:
        return LatentScaling.from_dict(read_json(Path(scaling)).get("scaling", {})).to_dict()
    except ValueError as error:
        raise ValueError(f"{scaling}: holds no statistics of latents ({error})") from None


def check_latents_alone(path: Path) -> None:
    """Raises ValueError where something other than latents would be replaced."""
    if not path.exists():
        return
    check_folder(path)
    if others := [entry.name for entry in path.iterdir() if not re.fullmatch(rf"\d{{5,}}\{SUFFIX}", entry.name)]:
        raise ValueError(f"{path}: holds other files than latents, {', '.join(sorted(others)[:9])}; write elsewhere")
