"""What a command reads and where it writes: one file to one, or every image of a folder to a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from flax_vae.io import files
from flax_vae.io.files import IMAGES
from flax_vae.jobs.screen import note


def pairs(source: Path, out: Path, suffix: str, resume: bool) -> list[tuple[Path, Path]]:
    """Gives each file to read with what to write of it: the images of a folder become OUT/NAME with this suffix.

    With `resume` those are left out that are there already. Raises ValueError for a folder without images, with
    several of one name, or that is `out` itself; what is not an image is left out, and named.
    """
    if not source.is_dir():
        return [(source, out)]
    check_apart(out, source)
    held = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    images = [path for path in held if path.suffix.lower() in IMAGES and path.is_file()]
    if not images:
        raise ValueError(f"{source}: a folder without images ({', '.join(IMAGES)}); flax-vae extract takes any clips")
    if others := [path.name for path in held if path not in images]:
        note(f"{source}: left out as no images: {', '.join(others[:9])}{' and more' * (len(others) > 9)}")
    return named(dict.fromkeys(images, suffix), out, resume)


def named(suffixes: Mapping[Path, str], out: Path, resume: bool) -> list[tuple[Path, Path]]:
    """Gives each source with OUT/NAME and its suffix; ValueError where two have one name."""
    from flax_vae.jobs.job import folder_of

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; for a folder give a folder to write")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; create it first")
    every = [(path, out / f"{path.name if path.is_dir() else path.stem}{suffix}") for path, suffix in suffixes.items()]
    counts = Counter(target.name for _, target in every)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{out}: several files would be named {', '.join(twice)}; give each a name of its own")
    is_done = [resume and target.exists() and not folder_of(target).exists() for _, target in every]
    left = [pair for pair, done in zip(every, is_done, strict=True) if not done]
    if len(left) < len(every):
        note(f"{out}: {len(every) - len(left)} of {len(every)} are there already")
    return left


def check_target(path: Path, suffixes: Sequence[str], source: Path) -> None:
    """Raises unless a file with one of these suffixes can be written to `path`, and is not the one that is read."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    files.check_target(path)
    check_apart(path, source)


def check_frames_target(path: Path, source: Path, frames: int | None) -> None:
    """Raises unless so many frames, None for not known, can be written to `path`: one also as an image."""
    from flax_vae.io.video_writer import SUFFIXES

    check_target(path, [*SUFFIXES, ".png"] if frames == 1 else SUFFIXES, source)


def check_apart(path: Path, source: Path) -> None:
    """Raises ValueError when what is to be written is what is read."""
    if path.exists() and source.exists() and os.path.samefile(path, source):
        raise ValueError(f"{path}: is the {'folder' if path.is_dir() else 'file'} that is read; write to another one")
