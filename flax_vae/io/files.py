"""Files that take their names only when they are complete, so that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import filelock

PathLike = str | os.PathLike[str]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # suffixes of files with one picture


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renamed to `path` at a clean exit, removed at any other.

    Its suffix is that of `path`, in small letters. Raises what `check_target` raises; an error of the system that names
    no file, such as of a full disk, gets the name of `path`.
    """
    check_target(path)
    part = Path(path).with_name(f".{uuid.uuid4().hex}{Path(path).suffix.lower()}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Makes `path` an empty folder and removes it at the end; what a killed process left in it is removed before."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def locked(path: Path, busy: str) -> filelock.BaseFileLock:
    """Gives the lock that is the file `path`, taken; ValueError that says `busy` where another process has it."""
    import filelock  # commands that lock nothing answer without it

    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ValueError(busy) from None
    return lock


def check_target(path: PathLike) -> None:
    """Raises ValueError where `path` is a folder, FileNotFoundError where the folder it would be in is missing."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder; add a file name")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}; create it first")
