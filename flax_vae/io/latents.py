"""Latents on disk: safetensors files with `mean` and `logvar`, (1, t, h, w, z), and what decoding them takes.

A clip is one file, or a folder of files, each with the latents that follow those of the file before.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from flax_vae.io.files import PathLike, replacing
from flax_vae.io.finite import check_finite
from flax_vae.io.video.frame_times import constant, from_text, join_times, to_text
from flax_vae.io.weights import Arrays, SafetensorsFile, write_safetensors

FORMAT = {"format": "flax_vae latents", "version": "2"}
SUFFIX = ".safetensors"
NAMES = ("mean", "logvar")
RATE = re.compile(r"[1-9]\d{0,9}(/[1-9]\d{0,9})?", re.ASCII)  # Fraction would also take 1e999999999, and all memory


@dataclass(frozen=True)
class About:
    """What latents files say of their clip, whose frames have `height` x `width` pixels, `fps` a second.

    `config` and `weights` are hashes of the model's. The latents are stored as they were encoded; `scaling` holds the
    statistics by which a diffusion model shifts and scales them.
    """

    height: int
    width: int
    fps: Fraction
    config: str
    weights: str
    scaling: Mapping[str, Any] | None = None

    def to_metadata(self) -> dict[str, str]:
        """Returns the texts that a safetensors header can hold."""
        texts = {name: str(getattr(self, name)) for name in ("height", "width", "fps", "config", "weights")}
        return {**FORMAT, **texts, "scaling": json.dumps(self.scaling)}

    @classmethod
    def from_metadata(cls, texts: Mapping[str, str]) -> Self:
        """Reads what `to_metadata` returned; ValueError or KeyError for anything else."""
        if {key: texts.get(key) for key in FORMAT} != FORMAT:
            raise ValueError(f"holds no latents of version {FORMAT['version']}; flax-vae encode writes them")
        if not RATE.fullmatch(texts["fps"]):
            raise ValueError(f"fps={texts['fps']!r:.99}: expected frames per second as 25 or 30000/1001")
        sizes = int(texts["height"]), int(texts["width"])
        if min(sizes) < 1:
            raise ValueError(f"{sizes[0]}x{sizes[1]}: expected a height and width of 1 pixel or more")
        return cls(*sizes, Fraction(texts["fps"]), texts["config"], texts["weights"], json.loads(texts["scaling"]))


def write_latents(
    path: PathLike,
    about: About,
    mean: np.ndarray,
    logvar: np.ndarray,
    frames: int,
    start: int = 0,
    last: bool = True,
    times: Sequence[Fraction] | None = None,
) -> None:
    """Writes latents (1, t, h, w, z); the file takes its name when it is complete.

    Args:
      path: of the file.
      about: what all files of the clip say.
      mean, logvar: the latents.
      frames: the number of frames that they stand for.
      start: the index of the first of them among the clip's latents.
      last: whether the clip ends with these.
      times: the seconds at which the frames begin, and the last one ends, where these are not at a constant rate.

    Raises:
      ValueError: NaN or infinity.
    """
    check_finite("latents", mean)
    check_finite("variances of latents", logvar)
    span = {"start": str(start), "frames": str(frames), "last": json.dumps(last)}
    if times is not None:
        span["times"] = to_text(times)
    with replacing(path) as part:
        write_safetensors(part, Arrays({"mean": mean, "logvar": logvar}), about.to_metadata() | span)


@dataclass(frozen=True)
class Shard:
    """One file of latents: their index in the clip, and the number and times of the frames that they stand for."""

    path: Path
    about: About
    shape: tuple[int, ...]
    start: int
    frames: int
    last: bool
    times: Sequence[Fraction] | None  # None where they are at a constant rate

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the header of a file."""
        file = SafetensorsFile(path)
        try:
            about = About.from_metadata(file.metadata)
            start, frames = (int(file.metadata[key]) for key in ("start", "frames"))
            shapes = {file.specs[name] for name in NAMES}
            (shape, dtype), *others = shapes
            is_fitting = dtype == "float32" and len(shape) == 5 and shape[0] == 1 and 0 not in shape
            if others or not is_fitting or min(start, frames - 1) < 0:
                raise ValueError(f"expected float32 mean and logvar of one shape (1, t, h, w, z), got {sorted(shapes)}")
            times = from_text(file.metadata["times"]) if "times" in file.metadata else None
            if times and len(times) != frames + 1:
                raise ValueError(f"got {len(times)} times for {frames} frames, expected one more")
            return cls(path, about, shape, start, frames, bool(json.loads(file.metadata["last"])), times)
        except (ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
            raise ValueError(f"{path}: not a latents file, or damaged: {error}") from None

    def read(self, name: str) -> np.ndarray:
        """Reads `mean` or `logvar`."""
        return SafetensorsFile(self.path).read(name)


def first_file(folder: Path) -> Path:
    """Returns the path of the first of a clip's files."""
    return folder / f"00000{SUFFIX}"


class Latents:
    """The latents of one clip, a file or a folder of files that are read as they are needed.

    Raises FileNotFoundError, or ValueError for files that are damaged, or not all of one clip.
    """

    def __init__(self, path: PathLike):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; flax-vae encode writes latents")
        files = sorted(path.glob(f"[!.]*{SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path}: holds no latents (*{SUFFIX}); flax-vae encode writes them")
        self.path, self.shards = path, [Shard.open(file) for file in files]
        self.about, start = self.shards[0].about, 0
        for shard in self.shards:
            if (shard.start, shard.about, shard.shape[2:]) != (start, self.about, self.shards[0].shape[2:]):
                raise ValueError(f"{shard.path}: does not follow the files before it in {path}; encode again")
            start += shard.shape[1]
            if shard.last != (shard is self.shards[-1]):
                what = "goes on after its end" if shard.last else "lacks its end"
                raise ValueError(f"{path}: {what}, the files are not all of one clip; encode again")

    @property
    def frames(self) -> int:
        """Number of frames of the clip."""
        return sum(shard.frames for shard in self.shards)

    @property
    def times(self) -> list[Fraction]:
        """The seconds after the first frame at which the frames begin, and the last one ends."""
        starts = itertools.accumulate((shard.frames for shard in self.shards), initial=0)
        files = zip(self.shards, starts, strict=False)
        return join_times([shard.times or constant(shard.frames, self.about.fps, start) for shard, start in files])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape (t, h, w, z) of the latents."""
        _, _, height, width, channels = self.shards[0].shape
        return sum(shard.shape[1] for shard in self.shards), height, width, channels

    @property
    def identity(self) -> str:
        """Text that differs for other files: their paths, sizes and times of writing."""
        status = [(shard.path.absolute(), shard.path.stat()) for shard in self.shards]
        text = repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in status])
        return f"{self.path.absolute()} ({hashlib.sha256(text.encode()).hexdigest()[:16]})"

    def means(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yields one mean (h, w, z) after the other, from index `start` on."""
        for shard in self.shards:
            if shard.start + shard.shape[1] > start:
                yield from shard.read("mean")[0, max(start - shard.start, 0) :]

    def read(self, name: str = "mean") -> np.ndarray:
        """Reads all of `mean` or `logvar`, (1, t, h, w, z)."""
        return np.concatenate([shard.read(name) for shard in self.shards], axis=1)
