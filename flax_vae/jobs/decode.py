"""Decodes latents on disk to clips of any length, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.jobs.budget import chunk_latents
from flax_vae.jobs.clip import filled
from flax_vae.jobs.frames import IMAGE, VIDEO, FramePieces, assemble
from flax_vae.jobs.model import Model, check_stream, config_hash, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import Chunk, marked, run
from flax_vae.jobs.screen import Meter, note, progress
from flax_vae.jobs.sources import check_apart, check_frames_target, named

if TYPE_CHECKING:
    from flax_vae.io.latents import Latents
    from flax_vae.jobs.job import Progress
    from flax_vae.models.config import VAEConfig


def decode(latents: Path, out: Path, weights: str, options: Options) -> Meter:
    """Decodes the latents of a clip, or of each clip in a folder; returns how far and fast it went."""
    from flax_vae.jobs.job import check_begun

    config = read_config(weights)
    work = sources(latents, out, config, weights, options.resume)
    check_stream(options.mesh, config, ((source.about.height, source.about.width) for source, _ in work))
    for _, target in work:
        check_begun(target, options.resume)
    model = load(weights, options)
    for source, _ in work:
        if source.about.weights != model.weights:
            note(
                f"{source.path}: comes from other weights of the same config, or from another precision "
                f"(hash {source.about.weights})"
            )
    if is_many(latents):
        out.mkdir(exist_ok=True)
    with progress("decoding", sum(source.frames for source, _ in work)) as meter:
        for source, target in work:
            decode_clip(source, target, model, options, meter)
    return meter


def decode_clip(source: Latents, target: Path, model: Model, options: Options, meter: Meter) -> None:
    """Decodes one clip, or goes on with it."""
    from flax_vae.jobs.job import Job
    from flax_vae.runtime.stream import compiled

    about, (_, *size) = source.about, source.shape
    step = compiled(model.vae.decode_chunk, model.mesh)
    with Job(target, {"command": "decode", "latents": source.identity, **model.identity}, options.resume) as job:
        meter.already(job.progress.frames)
        if not job.progress.is_complete:
            shape = lambda latents: (1, max(latents, 1), *size)  # noqa: E731
            latents = job.decision("chunk", lambda: chunk_latents(step, shape, source.shape[0], options.budget))
            chunks = chunks_of(source, latents, model.vae.config, job.progress)
            run(job, step, chunks, FramePieces(job, target, about.fps, about.height, about.width), meter)
        assemble(job, target, about.fps)


def chunks_of(source: Latents, size: int, config: VAEConfig, done: Progress) -> Iterator[Chunk]:
    """Yields the means that are not done yet, the first one of the clip alone, then `size` at a time.

    The last chunk is filled by repeating its last latent: a shape of its own would be compiled for it alone.
    """
    from flax_vae.runtime.stream import cut

    frames, latents = done.frames, done.latents
    for means, is_last in marked(cut(source.means(latents), size, first=size if latents else 1)):
        length = len(means)
        decoded = min(config.chunk_frames(length) if latents else 1, source.frames - frames)
        filling = np.repeat(means[-1:], size - length if latents else 0, axis=0)
        yield Chunk(np.concatenate([means, filling])[None], decoded, length, is_last)
        frames, latents = frames + decoded, latents + length


def sources(path: Path, out: Path, config: VAEConfig, weights: str, resume: bool) -> list[tuple[Latents, Path]]:
    """Opens the latents to decode, and says where each goes; ValueError where they are not this model's."""
    from flax_vae.io.latents import Latents

    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".")) if is_many(path) else [path]
    opened = {entry: Latents(entry) for entry in entries}
    for source in opened.values():
        check_latents(source, config, weights)
    if entries == [path]:
        check_frames_target(out, path, opened[path].frames)
        return [(opened[path], out)]
    check_apart(out, path)
    suffixes = {entry: IMAGE if source.frames == 1 else VIDEO for entry, source in opened.items()}
    return [(opened[entry], target) for entry, target in named(suffixes, out, resume)]


def is_many(path: Path) -> bool:
    """Whether a folder holds the latents of several clips, each in a folder or a file of its own."""
    from flax_vae.io.latents import first_file

    return path.is_dir() and any(path.iterdir()) and not first_file(path).exists()


def check_latents(source: Latents, config: VAEConfig, weights: str) -> None:
    """Raises ValueError unless a model of this config has encoded the latents, and all of them are there."""
    about = source.about
    if about.config != (ours := config_hash(config)):
        raise ValueError(
            f"{source.path} comes from a model of another config (hash {about.config}; that of {weights} is {ours}): "
            "decode with the checkpoint that encoded it"
        )
    expected = config.latent_shape(filled(source.frames, config), about.height, about.width)
    if source.shape != expected:
        raise ValueError(f"{source.path}: latents of shape {source.shape}, expected {expected}; encode the clip again")
