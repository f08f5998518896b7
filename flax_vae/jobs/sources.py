"""What a command reads and where it writes: one file to one, or every image of a folder to a folder."""

import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from flax_vae.io import files
from flax_vae.io.files import IMAGES
from flax_vae.io.video_writer import SUFFIXES
from flax_vae.jobs.clip import Clip, check_reading, open_entry
from flax_vae.jobs.job import check_begun, folder_of
from flax_vae.jobs.model import check_stream
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import Chunk
from flax_vae.jobs.screen import first_few, note
from flax_vae.models.config import VAEConfig

NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


@contextmanager
def reading() -> Iterator[None]:
    """Makes an OSError of reading a clip a ValueError: those that are left are of what is written."""
    try:
        yield
    except OSError as error:
        raise ValueError(str(error)) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError of what is named after a file a ValueError: one of the disk, such as a full one, stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
        raise ValueError(f"{path}: nothing can be written under its name ({error.strerror}); rename it") from error


class Attempts:
    """Counts what is done of a folder, and keeps the errors of the rest; what is read alone raises its own."""

    def __init__(self, source: Path, is_alone: bool):
        self._source, self._is_alone, self.done = source, is_alone, 0
        self._errors: list[str] = []

    @contextmanager
    def attempt(self, path: Path, done: int = 1) -> Iterator[None]:
        """Counts one that is done, or keeps the ValueError for the end; an OSError, as of a full disk, ends all."""
        try:
            with nullcontext() if self._is_alone else naming(path):
                yield
            self.done += done
        except ValueError as error:
            if self._is_alone:
                raise
            self._errors.append(str(error))

    def check(self) -> None:
        """Raises ValueError with all errors, if any."""
        total = self.done + len(self._errors)
        if self._errors and total == 1:
            raise ValueError(self._errors[0])
        if self._errors:
            count = f"{len(self._errors)} of {total} cannot be done and are left out"
            raise ValueError("\n".join([f"{self._source}: {count}:", *first_few(self._errors)]))


def open_clips(
    source: Path, out: Path, suffix: str, config: VAEConfig, options: Options
) -> tuple[list[tuple[Clip, Path]], Attempts]:
    """Opens a clip, or the images of a folder, each with its target, and notes what is done to their sizes.

    The images of a folder become OUT/NAME with this suffix; those that cannot be read, or that the mesh does not
    divide, are left out, and returned as attempts. ValueError where none is left, for a single clip that cannot be
    read, for a target that is begun, unless `options` resume it, and for what `pairs` refuses.
    """
    check_reading(config, options.size, options.frames)
    check_stream(options.mesh, config, ())
    kind = "image" if source.is_dir() else "video"
    opened, attempts = [], Attempts(source, is_alone=not source.is_dir())
    for path, target in pairs(source, out, suffix, options.resume):
        with attempts.attempt(path, done=0), reading():
            clip = open_entry(kind, path, config, options.size, options.frames)
            check_stream(options.mesh, config, [(clip.height, clip.width)])
            opened.append((clip, target))
    if not opened:
        attempts.check()
    for clip, target in opened:
        note(clip.about)
        check_begun(target, options.resume)
    return opened, attempts


def source_of(clip: Clip) -> dict[str, object]:
    """Returns what tells a clip from another; ValueError where it is gone."""
    with reading():
        return clip.source


def chunks_of(clip: Clip, latents: int, start: int = 0) -> Iterator[Chunk]:
    """Yields the chunks of a clip; ValueError for whatever is wrong with it."""
    with reading():
        yield from clip.chunks(latents, start)


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
    left = [
        (path, to) for path, to in every if not (resume and os.path.exists(to) and not os.path.exists(folder_of(to)))
    ]
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
