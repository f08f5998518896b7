"""Decodes latents on disk to clips of any length, a chunk at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flax_vae.io.finite import computed_of
from flax_vae.io.latents import Latents, first_file
from flax_vae.jobs.budget import chunk_latents
from flax_vae.jobs.clip import check_pixels
from flax_vae.jobs.frames import IMAGE, VIDEO, assemble, write_piece
from flax_vae.jobs.job import Job, Progress, check_begun
from flax_vae.jobs.model import Model, check_stream, config_hash, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import Chunk, cut_padded, run
from flax_vae.jobs.screen import Meter, note, progress
from flax_vae.jobs.sources import Attempts, check_apart, check_frames_target, named, reading
from flax_vae.models.config import VAEConfig
from flax_vae.runtime.stream import compiled


def decode(latents: Path, out: Path, weights: str, options: Options) -> tuple[Meter, Attempts]:
    """Decodes the latents of a clip, or of each clip in a folder.

    Args:
      latents: a file or folder of latents, or a folder of such.
      out: the video or image to write, or the folder of them.
      weights: the checkpoint that encoded them.
      options: how to compute.

    Returns:
      How far and fast it went, and which clips of a folder could not be done.
    """
    config = read_config(weights)
    check_pixels(config)
    check_stream(options.mesh, config, ())
    work, attempts = open_latents(latents, out, config, weights, options)
    for _, target in work:
        check_begun(target, options.resume)
    model = load(weights, options)
    for source, _ in work:
        if source.about.weights != model.weights:
            note(
                f"{source.path}: comes from other weights of the same config, or from another precision "
                f"(hash {source.about.weights})"
            )
    with progress("decoding", sum(source.frames for source, _ in work)) as meter:
        for source, target in work:
            with attempts.attempt(source.path):
                decode_clip(source, target, model, options, meter)
    return meter, attempts


def decode_clip(source: Latents, target: Path, model: Model, options: Options, meter: Meter) -> None:
    """Decodes one clip, or goes on with it."""
    about, (frames, *sizes) = source.about, source.shape
    step = compiled(model.vae.decode_chunk, model.mesh)
    settings = {"command": "decode", "latents": source.identity, **model.identity}
    with computed_of(source.path), Job(target, settings, options.resume) as job:
        shape = lambda latents: (1, max(latents, 1), *sizes)  # noqa: E731
        size = job.decision("chunk", lambda: chunk_latents(step, model.mesh, shape, frames, options.budget))
        chunks = chunks_of(source, size, model.vae.config, job.progress)
        run(job, step, chunks, partial(write_piece, job, about.fps, about.height, about.width), meter)
        assemble(job, about.fps)


def chunks_of(source: Latents, size: int, config: VAEConfig, done: Progress) -> Iterator[Chunk]:
    """Yields the means that are left, the first one of the clip alone, then `size` at a time."""
    frames, latents, times = done.frames, done.latents, source.times
    with reading():
        for means, number, is_last in cut_padded(source.means(latents), size, is_start=latents == 0):
            decoded = min(config.chunk_frames(number) if latents else 1, source.frames - frames)
            yield Chunk(means[None], decoded, number, is_last, times[frames : frames + decoded + 1])
            frames, latents = frames + decoded, latents + number


def open_latents(
    path: Path, out: Path, config: VAEConfig, weights: str, options: Options
) -> tuple[list[tuple[Latents, Path]], Attempts]:
    """Opens the latents to decode, each clip's with its target; those of a folder that cannot be are left out.

    ValueError where none is left, and for a single clip whose latents are damaged or not this model's.
    """
    is_one = not path.is_dir() or not any(path.iterdir()) or first_file(path).exists()
    entries = [path] if is_one else sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    opened: dict[Path, Latents] = {}
    attempts = Attempts(path, is_one)
    for entry in entries:
        with attempts.attempt(entry, done=0), reading():
            source = Latents(entry)
            check_latents(source, config, weights)
            check_stream(options.mesh, config, [(source.about.height, source.about.width)])
            opened[entry] = source
    if not opened:
        attempts.check()
    if is_one:
        check_frames_target(out, path, opened[path].frames)
        return [(opened[path], out)], attempts
    check_apart(out, path)
    suffixes = {entry: IMAGE if source.frames == 1 else VIDEO for entry, source in opened.items()}
    return [(opened[entry], target) for entry, target in named(suffixes, out, options.resume)], attempts


def check_latents(source: Latents, config: VAEConfig, weights: str) -> None:
    """Raises ValueError unless a model of this config has encoded the latents, and all of them are there."""
    about = source.about
    if about.config != (ours := config_hash(config)):
        raise ValueError(
            f"{source.path} comes from a model of another config (hash {about.config}; that of {weights} is {ours}): "
            "decode with the checkpoint that encoded it"
        )
    expected = config.latent_shape(config.fitted_frames(source.frames, "pad"), about.height, about.width)
    if source.shape != expected:
        raise ValueError(f"{source.path}: latents of shape {source.shape}, expected {expected}; encode the clip again")
