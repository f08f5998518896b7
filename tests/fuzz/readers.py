"""The functions that the commands read files with, by kind of sample, and the errors that they may raise."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

DOCUMENTED = (ValueError, FileNotFoundError, ImportError)  # the last where a package is missing
SIZE = (16, 24)


def read_checkpoint(path: Path, number: int) -> None:
    """Reads config, shapes and tensors as `flax-vae info` and `port` do; every eighth time as a model."""
    from flax_vae.families import registry

    if number % 8 == 0:
        registry.from_pretrained(path)
        return
    source = registry.open_source(path)
    registry.read_config(source)
    for key in source.shapes():
        source.read(key)


def read_manifest(path: Path, _: int) -> None:
    from flax_vae.io.manifest import read_entries

    read_entries(path)


def read_run(path: Path, _: int) -> None:
    """Reads the logs of an extraction, and the folder of a training run."""
    from flax_vae.io.manifest import read_settings
    from flax_vae.jobs.extract import outcomes
    from flax_vae.train.history import read_history

    read_settings(path / "log.jsonl")
    list(outcomes(path / "log.jsonl"))
    read_history(path)


def read_statistics(path: Path, _: int) -> None:
    from flax_vae.jobs.encode import read_scaling

    read_scaling(str(path))


def read_latents(path: Path, _: int) -> None:
    from flax_vae.io.latents import Latents

    held = Latents(path)
    list(held.means())
    held.read("logvar")


def read_carry(path: Path, _: int) -> None:
    from flax_vae.io.trees import load_tree

    load_tree(path)


def read_clip(path: Path, number: int, frames: int = 2) -> None:
    """Reads a clip as `encode` does, as training does, and its sound as `reconstruct` does."""
    from flax_vae.io.video.draw import draw_frames
    from flax_vae.io.video_reader import probe, read_frames

    errors = []
    for read in (
        lambda: probe(path),
        lambda: [frame.shape for frame in read_frames(path, SIZE)],
        lambda: draw_frames(path, frames, SIZE, moment=number % 10 / 10),
    ):
        try:
            read()
        except DOCUMENTED as error:
            errors.append(error)
    if number % 4 == 0:
        copy_sound(path)
    if errors:
        raise errors[0]


def copy_sound(path: Path) -> None:
    """Joins the sound of a clip with whole pictures; nothing may be left where it cannot be read."""
    from flax_vae.io.video_join import join
    from flax_vae.io.video_writer import VideoWriter

    piece, target = path.with_name("piece.mp4"), path.with_name("whole.mp4")
    try:
        with VideoWriter(piece, 25, 24, 32) as writer:
            writer.write(np.zeros((3, 24, 32, 3), np.uint8))
        try:
            join(target, [piece], Fraction(25), path)
        except DOCUMENTED as error:
            check_names(error, path)
            return
        target.unlink()
    finally:
        piece.unlink(missing_ok=True)


def check_names(error: Exception, path: Path) -> None:
    """Raises AssertionError unless the message names the file, the folder, or another file in it."""
    named = (str(path), str(path.parent) if path.is_file() else str(path))
    if not any(name in str(error) for name in named):
        raise AssertionError(f"the message names no file: {type(error).__name__}: {error}") from error


READERS: dict[str, Callable[[Path, int], None]] = {
    "checkpoint": read_checkpoint,
    "torch": read_checkpoint,
    "manifest": read_manifest,
    "run": read_run,
    "statistics": read_statistics,
    "latents": read_latents,
    "carry": read_carry,
    "clip": read_clip,
    "image": partial(read_clip, frames=1),
}
