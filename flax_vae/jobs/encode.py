"""Encodes clips of any length to latents on disk, a chunk at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vae.jobs.budget import chunk_latents
from flax_vae.jobs.clip import Clip, expected, open_clip
from flax_vae.jobs.model import Model, check_stream, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import Chunk, run
from flax_vae.jobs.screen import Meter, note, progress
from flax_vae.jobs.sources import pairs

if TYPE_CHECKING:
    from flax_vae.io.latents import About
    from flax_vae.jobs.job import Job


def encode(video: Path, out: Path, weights: str, options: Options, scaling: str | None = None) -> Meter:
    """Encodes a clip to a folder of latents, or every image of a folder; returns how far and fast it went.

    `scaling` names the statistics that are noted beside the latents: a released variant, or a file of `extract`.
    """
    from flax_vae.jobs.job import check_begun

    config, statistics = read_config(weights), read_scaling(scaling)
    work = [
        (open_clip(path, config, options.size, options.frames), target)
        for path, target in pairs(video, out, "", options.resume)
    ]
    check_stream(options.mesh, config, ((clip.height, clip.width) for clip, _ in work))
    for clip, target in work:
        note(clip.about)
        check_folder(target, video.is_dir())
        check_begun(target, options.resume)
    model = load(weights, options)
    if video.is_dir():
        out.mkdir(exist_ok=True)
    with progress("encoding", expected(clip for clip, _ in work)) as meter:
        for clip, target in work:
            clip.report(encode_clip(clip, target, model, options, meter, statistics))
    return meter


def encode_clip(
    clip: Clip,
    target: Path,
    model: Model,
    options: Options,
    meter: Meter,
    scaling: dict[str, Any] | None = None,
) -> int:
    """Encodes one clip to a folder of latents, or goes on with it; returns the number of its frames."""
    from flax_vae.io.latents import About
    from flax_vae.jobs.job import Job
    from flax_vae.runtime.stream import compiled

    about = About(clip.height, clip.width, clip.fps, model.config_hash, model.weights, scaling)
    step = compiled(model.vae.encode_chunk, model.mesh)
    with Job(target, {"command": "encode", **clip.source, **model.identity, "about": about}, options.resume) as job:
        meter.already(job.progress.frames)
        if not job.progress.is_complete:
            latents = job.decision(
                "chunk", lambda: chunk_latents(step, clip.shape, clip.expected_latents, options.budget)
            )
            run(job, step, clip.chunks(latents, job.progress.frames), LatentPieces(job, about), meter)
        job.become()
    return job.progress.frames


class LatentPieces:
    """Collects the distributions of latents and writes each piece to a file."""

    def __init__(self, job: Job, about: About):
        self.job, self.about = job, about
        self._start, self._frames = job.progress.latents, 0
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def __enter__(self) -> LatentPieces:
        return self

    def __exit__(self, *exception) -> None: ...

    def add(self, result: Any, chunk: Chunk) -> None:
        """Keeps the latents of a chunk that are no filling."""
        mean, logvar = (np.asarray(x, np.float32)[:, : chunk.latents] for x in (result.mean, result.logvar))
        self._parts.append((mean, logvar))
        self._frames += chunk.frames

    def finish(self, is_last: bool) -> None:
        """Writes what was added since the last piece."""
        from flax_vae.io.latents import SUFFIX, write_latents

        mean, logvar = (np.concatenate(parts, axis=1) for parts in zip(*self._parts, strict=True))
        write_latents(self.job.piece(SUFFIX), self.about, mean, logvar, self._frames, self._start, is_last)
        self._start, self._frames, self._parts = self._start + mean.shape[1], 0, []


def read_scaling(scaling: str | None) -> dict[str, Any] | None:
    """Returns the statistics of a released variant, or those in a file; ValueError where it holds none."""
    from flax_vae.families.registry import released_scaling
    from flax_vae.io.files import read_json
    from flax_vae.models.latents import LatentScaling

    if scaling is None:
        return None
    if not Path(scaling).is_file():
        return released_scaling(scaling).to_dict()
    try:
        return LatentScaling.from_dict(read_json(Path(scaling)).get("scaling", {})).to_dict()
    except ValueError as error:
        raise ValueError(f"{scaling}: holds no statistics of latents ({error})") from None


def check_folder(path: Path, parent_is_made: bool) -> None:
    """Raises unless `path` can become a folder of latents without harm to anything else."""
    from flax_vae.io.latents import SUFFIX

    if not parent_is_made and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; give a folder to write")
    held = [entry.name for entry in path.iterdir()] if path.exists() else []
    if others := [name for name in held if not re.fullmatch(rf"\d{{5,}}\{SUFFIX}", name)]:
        raise ValueError(f"{path}: holds other files than latents, {', '.join(sorted(others)[:9])}; write elsewhere")
