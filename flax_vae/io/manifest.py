"""Data sets of clips: their list, and a log of what was done with each, in JSON lines."""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flax_vae.io.files import IMAGES, PathLike, locked, replacing, to_json

VIDEOS = (
    *(".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif", ".ogv"),
    *(".m2ts", ".mts", ".vob", ".3gp", ".mxf", ".apng"),
)
KINDS = ("video", "image")
EXPECTED = f"expected a manifest of JSON lines, a folder, or a clip that ends in {', '.join(VIDEOS)}"


@dataclass(frozen=True)
class Entry:
    """A clip of a data set: its kind, "video" or "image", its path, and a name of its own."""

    kind: str
    path: Path
    name: str


def read_entries(source: PathLike) -> list[Entry]:
    """Lists the clips of a manifest, or all videos and images in a folder and its subfolders, sorted, or one clip.

    A file with the suffix of a video or an image is one clip; any other is a manifest, which has a line
    `{"video": path}` or `{"image": path}` for each clip; other keys are for other readers, and paths start from the
    manifest's folder. Raises FileNotFoundError, or ValueError where there is no clip, and for a line, by its number,
    that is something else.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or manifest")
    if source.is_dir():
        entries = _in_folder(source)
    elif kind := _kind(source):
        entries = [Entry(kind, source.absolute(), source.name)]
    else:
        entries = list(dict.fromkeys(_in_manifest(source)))
    if not entries:
        raise ValueError(f"{source}: lists no video and no image")
    return entries


def _kind(path: Path) -> str | None:
    return "image" if path.suffix.lower() in IMAGES else "video" if path.suffix.lower() in VIDEOS else None


def _in_folder(folder: Path) -> list[Entry]:
    found, folder = [], folder.absolute()
    for path in sorted(folder.rglob("*")):
        kind = _kind(path)
        if kind and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            found.append(Entry(kind, path, path.relative_to(folder).as_posix()))
    return found


def _in_manifest(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            values = parsed(line, path, number, f"; {EXPECTED}")
            kinds = [kind for kind in KINDS if isinstance(values.get(kind), str)]
            if len(kinds) != 1:
                raise ValueError(f'{path}, line {number}: expected {{"video": path}} or {{"image": path}}')
            clip = (path.parent / values[kinds[0]]).absolute()
            try:
                name = os.fsencode(clip)
            except UnicodeEncodeError:
                raise ValueError(f"{path}, line {number}: no file can be named {values[kinds[0]]!r:.99}") from None
            digest = hashlib.sha256(name).hexdigest()[:12]  # clips of one name may lie in several folders
            yield Entry(kinds[0], clip, f"{clip.stem}-{digest}{clip.suffix}")


def write_lines(path: PathLike, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line; the file takes its name when it is complete."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(to_json(line) + "\n" for line in lines)


class Log:
    """A file that gets a line for each thing done, and that is read when the work is resumed.

    Its first line holds the `settings` of the work. A last line that a killed process left torn is removed. Raises
    ValueError where the log was begun with other settings, and while another process writes it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self._settings = path, as_json(settings)

    def __enter__(self) -> Self:
        lock = locked(self.path.with_name(f".{self.path.name}.lock"), f"{self.path}: another process is writing it")
        with contextlib.ExitStack() as stack:
            stack.callback(lock.release)
            self._file = stack.enter_context(open(self.path, "a+b"))
            self._file.truncate(sum(len(line) for line in whole_lines(self.path)))
            before = read_settings(self.path)
            if before is None:
                self.add(self._settings)
            elif before != self._settings:
                raise ValueError(f"{self.path}: was begun otherwise, with {json.dumps(before)}; write elsewhere")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends a line, and flushes it."""
        self._file.write(to_json(line).encode() + b"\n")
        self._file.flush()


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as a log holds them: what JSON does not know becomes its text."""
    return json.loads(to_json(settings, default=str))


def read_settings(path: Path) -> dict[str, Any] | None:
    """Reads the settings with which a log was begun; None where there is no log."""
    return next(parsed_lines(path), None)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log, which may still be written, after its settings; none where there is no log."""
    yield from itertools.islice(parsed_lines(path), 1, None)


def parsed_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects in the lines of a file, without a torn last one; ValueError names a damaged line."""
    yield from (parsed(line, path, number) for number, line in enumerate(whole_lines(path), 1))


def parsed(line: bytes, path: Path, number: int, expected: str = "") -> dict[str, Any]:
    """Returns the JSON object in a line; ValueError names the file, the number of the line, and what was expected."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}){expected}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got a {type(values).__name__}")
    return values


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, without a torn last one; none where there is no file."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
