"""What a command reads and where it writes: one file to one, or every image of a folder to a folder."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from flax_vae.io import files
from flax_vae.io.files import IMAGES
from flax_vae.io.video_writer import SUFFIXES
from flax_vae.jobs.clip import Clip, open_entry
from flax_vae.jobs.job import check_begun, folder_of
from flax_vae.jobs.model import check_stream
from flax_vae.jobs.options import Options
from flax_vae.jobs.screen import note
from flax_vae.models.config import VAEConfig


def open_clips(source: Path, out: Path, suffix: str, config: VAEConfig, options: Options) -> list[tuple[Clip, Path]]:
    """Opens a clip, or the images of a folder, each with its target, and notes what is done to their sizes.

    The images of a folder become OUT/NAME with this suffix. ValueError for a clip that cannot be read, or that the mesh
    does not divide, for a target that is begun, unless `options` resume it, and for what `pairs` refuses.
    """
    found = pairs(source, out, suffix, options.resume)
    kind = "image" if source.is_dir() else "video"
    opened = [(open_entry(kind, path, config, options.size, options.frames), target) for path, target in found]
    check_stream(options.mesh, config, ((clip.height, clip.width) for clip, _ in opened))
    for clip, target in opened:
        note(clip.about)
        check_begun(target, options.resume)
    return opened


def pairs(source: Path, out: Path, suffix: str, resume: bool) -> list[tuple[Path, Path]]:
    """Returns each file to read with its target; notes what is left out of a folder.

    ValueError for a folder without images, with several of one name, or that is `out` itself.
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
    """Returns each source with its target OUT/NAME and suffix; ValueError where two have one name."""
    check_folder(out)
    every = [(path, out / f"{path.name if path.is_dir() else path.stem}{suffix}") for path, suffix in suffixes.items()]
    counts = Counter(target.name for _, target in every)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{out}: several files would be named {', '.join(twice)}; give each a name of its own")
    left = [(path, to) for path, to in every if not (resume and to.exists() and not folder_of(to).exists())]
    if len(left) < len(every):
        note(f"{out}: {len(every) - len(left)} of {len(every)} are there already")
    return left


def check_folder(path: Path) -> None:
    """Raises ValueError where `path` is a file, FileNotFoundError where the folder for it is missing."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; give a folder to write")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.absolute().parent}; create it first")


def check_target(path: Path, suffixes: Sequence[str], source: Path) -> None:
    """Raises unless a file with one of these suffixes can be written to `path`, and is not the one that is read."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    files.check_target(path)
    check_apart(path, source)


def check_frames_target(path: Path, source: Path, frames: int | None) -> None:
    """Raises unless N frames, None where not known, can be written to `path`; one frame may also be an image."""
    check_target(path, [*SUFFIXES, ".png"] if frames == 1 else SUFFIXES, source)


def check_apart(path: Path, source: Path) -> None:
    """Raises ValueError when what is to be written is what is read."""
    if path.exists() and source.exists() and os.path.samefile(path, source):
        raise ValueError(f"{path}: is the {'folder' if path.is_dir() else 'file'} that is read; write to another one")
