"""Files that take their names only when complete, JSON that is checked, and what damaged files look like."""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock

PathLike = str | os.PathLike[str]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")  # suffixes of stills
SAFE, PICKLED = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")  # suffixes of weights
JSON_LIMIT = 2**26  # bytes of a JSON file
T = TypeVar("T")


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renamed to `path` at a clean exit, removed at any other.

    Its suffix is that of `path`, in lower case. Raises what `check_target` raises; an error of the system that names no
    file, such as of a full disk, gets the name of `path`.
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
    """Makes `path` an empty folder, without what a killed process left in it, and removes it at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def locked(path: Path, busy: str) -> filelock.BaseFileLock:
    """Acquires the lock that is the file `path`; ValueError with the text `busy` where another process holds it."""
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


def to_json(values: Any, **options: Any) -> str:
    """Returns values as JSON, with null for NaN and infinity, which JSON cannot hold; `options` are those of `json`."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(values), allow_nan=False, **options)


def read_json(path: Path, parse: Callable[[dict[str, Any]], T] = dict[str, Any]) -> T:
    """Reads a JSON object, as `parse` returns it; ValueError names the file and what is wrong."""
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise ValueError(f"{path}: has {size:,} bytes: expected a config or an index of at most {JSON_LIMIT:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); it looks like {kind(path)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, got a {type(values).__name__}")
    try:
        return parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def kind(path: Path) -> str:
    """Returns, as text, what a file looks like from its first bytes, and what to do about it."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of the file: run git lfs pull"
    if head.lstrip().startswith(b"<"):
        return "a web page instead of the file: fetch it again"
    if head[8:9] == b"{":
        claim = f"a header of {int.from_bytes(head[:8], 'little'):,} in {path.stat().st_size:,} bytes"
        return f"safetensors, whole or in part, with {claim}: fetch it again, or end its name in {SAFE[0]}"
    if head.startswith((b"PK", b"\x80")):
        return f"what torch writes, whole or in part: fetch it again, or end its name in {', '.join(PICKLED)}"
    return "something else: fetch it again"
