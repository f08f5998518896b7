"""Long work that can be stopped at any moment, kill -9 included, and resumed to the same result."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import filelock

from flax_vae.io import files
from flax_vae.io.trees import load_tree, save_tree

PROGRESS, LOCK, PIECES = "progress.safetensors", "lock", "pieces"
FORMAT = 2  # of what pieces hold: since 2 the times of their frames
MIN_WORK_PER_SAVE = 20  # times what the last save took: saves take at most a twentieth of the time


@dataclass(frozen=True)
class Progress:
    """How far the work has come: pieces that are whole, frames and latents in them, and whether that is all."""

    pieces: int = 0
    frames: int = 0
    latents: int = 0
    is_complete: bool = False


class Job:
    """A folder `.NAME.part` beside the target, with the pieces that are done and the carry to go on from.

    `with Job(target, settings, resume) as job:` write `job.piece(suffix)`, then `commit` it, and so on; after the last
    one make the target of them. The folder is removed at the end, and kept when anything fails after the first commit.

    Args:
      target: file or folder to write.
      settings: all that the result depends on.
      resume: whether to go on with what was begun.

    Raises:
      ValueError: work was begun, but not `resume`; with other settings; or another process is at it.
    """

    def __init__(self, target: Path, settings: Mapping[str, object], resume: bool):
        self.target, self.folder = target, folder_of(target)
        self.settings = {key: str(value) for key, value in settings.items()}
        self.progress, self.carry = Progress(), None
        self._decisions: dict[str, int] = {}
        self._resume, self._kept, self._saved, self._cost = resume, 0, 0.0, 0.0

    def __enter__(self) -> Self:
        check_begun(self.target, self._resume)
        self.folder.mkdir(parents=True, exist_ok=True)  # a folder of targets is made with the first
        with ExitStack() as stack:
            stack.callback(locked(self.target).release)
            if (self.folder / PROGRESS).exists():
                self._restore()
            self._clean()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, _) -> None:
        with self._stack:
            if kind is not None and (self.folder / PROGRESS).exists():
                how = "" if self._resume else " with --resume"
                error.add_note(f"{self.target}: {self._kept} frames are done, and kept to go on from{how}")
            else:
                (self.folder / PROGRESS).unlink(missing_ok=True)  # first of all: nobody may go on from what is left
                shutil.rmtree(self.folder, ignore_errors=True)

    def decision(self, name: str, decide: Callable[[], int]) -> int:
        """Returns what `decide` returns, or what it returned when the work was begun."""
        if name not in self._decisions:
            self._decisions[name] = decide()
        return self._decisions[name]

    def piece(self, suffix: str, number: int | None = None) -> Path:
        """Returns the path of a piece, by default of the next one."""
        return self.folder / PIECES / f"{self.progress.pieces if number is None else number:05d}{suffix}"

    def pieces(self, suffix: str) -> list[Path]:
        """Returns the paths of all pieces that are done."""
        return [self.piece(suffix, number) for number in range(self.progress.pieces)]

    def commit(self, carry: Any, frames: int, latents: int, is_complete: bool) -> None:
        """Counts one more piece, of N frames and latents, and saves the carry after it.

        Where saving takes long, pieces go by without it: what comes after the last save is then computed twice.
        """
        done = self.progress
        self.progress = Progress(done.pieces + 1, done.frames + frames, done.latents + latents, is_complete)
        began = time.monotonic()
        if is_complete or began - self._saved >= MIN_WORK_PER_SAVE * self._cost:
            texts = {"settings": self.settings, "decisions": self._decisions, "progress": asdict(self.progress)}
            about = {key: json.dumps(value) for key, value in {**texts, "format": FORMAT}.items()}
            save_tree(self.folder / PROGRESS, None if is_complete else carry, about)
            self._kept, self._saved = self.progress.frames, time.monotonic()
            self._cost = self._saved - began

    def become(self) -> None:
        """Renames the folder of the pieces to the target, and replaces what was there."""
        pieces = self.folder / PIECES
        if not any(pieces.iterdir()):
            return  # stopped after the rename
        if self.target.exists():
            os.replace(self.target, self.folder / "old")
        os.replace(pieces, self.target)

    def _restore(self) -> None:
        try:
            carry, about = load_tree(self.folder / PROGRESS)
            before, decisions, progress = (json.loads(about[key]) for key in ("settings", "decisions", "progress"))
            progress, version = Progress(**progress), json.loads(about.get("format", "1"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: cannot be gone on with ({error}); remove it to start anew") from None
        if version != FORMAT:
            how = f"go on with that version, or remove {self.folder} to start anew"
            raise ValueError(f"{self.target}: was begun by another version of flax_vae, with other pieces: {how}")
        names, now = sorted(self.settings.keys() | before.keys()), self.settings
        if changed := [name for name in names if before.get(name) != now.get(name)]:
            listed = "; ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in changed)
            raise ValueError(f"{self.target}: was begun otherwise ({listed}): go on as begun, or remove {self.folder}")
        self.carry, self.progress, self._decisions, self._kept = carry, progress, decisions, progress.frames

    def _clean(self) -> None:
        """Removes what is half-written, or belongs to a piece that is not committed."""
        (self.folder / PIECES).mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in (PROGRESS, LOCK, PIECES):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in (self.folder / PIECES).iterdir():
            if not path.stem.isdecimal() or int(path.stem) >= self.progress.pieces:
                path.unlink()


def folder_of(target: Path) -> Path:
    """Returns the folder in which a target is made."""
    return target.absolute().with_name(f".{target.name}.part")


def locked(target: Path) -> filelock.BaseFileLock:
    """Locks the folder in which a target is made; ValueError where another process has it."""
    return files.locked(folder_of(target) / LOCK, f"{target}: another process is writing it")


def check_begun(target: Path, resume: bool) -> None:
    """Raises ValueError where another process writes the target, or work on it was begun, but not `resume`."""
    folder = folder_of(target)
    if os.path.isdir(folder):  # not folder.is_dir(), which raises OSError for a name that is too long
        locked(target).release()
    if not resume and os.path.exists(folder / PROGRESS):
        raise ValueError(
            f"{target}: part of it is done, by a command that was stopped: give --resume to go on, or remove {folder} "
            "to start anew"
        )
