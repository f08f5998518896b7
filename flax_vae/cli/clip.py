"""How a command reads its clip: at which size, in which chunks, and with which frames repeated to fill the last one.

T frames, H W pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.cli.screen import counted, note
from flax_vae.io import files

if TYPE_CHECKING:
    from flax_vae.models.config import VAEConfig

CHUNK_LATENTS = 2  # what a chunk becomes; the first one has a latent more
SHORT_SIDE = 256  # of larger clips, where no size is asked for


@dataclass(frozen=True)
class Clip:
    """A video, the size to read it at, and the most frames to read; `stated` is what its header promises."""

    path: Path
    height: int
    width: int
    fps: Fraction
    limit: int | None
    stated: int | None
    factor: int

    @property
    def expected(self) -> int | None:
        """Frames to come, if known."""
        return min((n for n in (self.limit, self.stated) if n is not None), default=None)

    def chunks(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields uint8 (T, H, W, 3) chunks, the last one filled by repeating its last frame, and their real length."""
        from flax_vae.io.video import read_frames
        from flax_vae.runtime.stream import cut

        size = CHUNK_LATENTS * self.factor
        frames = read_frames(self.path, (self.height, self.width), self.limit)
        for i, chunk in enumerate(cut(frames, size)):
            # later chunks are filled up whole: a shape of its own for the last would be compiled for it alone
            missing = -len(chunk) % size if i else filled(len(chunk), self.factor) - len(chunk)
            yield np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]), len(chunk)

    def report(self, frames: int) -> None:
        """Says what has become of the number of frames, once `frames` have been read."""
        if self.limit is not None and frames < self.limit:
            note(f"{self.path} has {counted(frames)}, fewer than the {self.limit} asked for")
        elif frames != (self.expected or frames):
            note(f"{self.path} states {self.stated} frames, but {frames} were read")
        if (whole := filled(frames, self.factor)) != frames:
            note(
                f"{frames} frames are not {self.factor}k + 1: the last one is repeated to make {whole}, "
                "and the repeats are cut off after decoding"
            )


def open_clip(path: Path, config: VAEConfig, size: str | None, frames: int | None) -> Clip:
    """Finds out what a clip holds and decides its size, and says so; ValueError for a clip or size that will not do."""
    from flax_vae.io.pixels import fit_size
    from flax_vae.io.video import probe

    if frames is not None and frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")
    wanted = parse_size(size)
    info = probe(path)
    multiple = max(config.spatial_factor, 2)  # and H.264 needs even sizes
    if wanted is None and min(info.height, info.width) > SHORT_SIDE:
        wanted = SHORT_SIDE
    height, width = fit_size(info.height, info.width, multiple, wanted)
    if (height, width) == (info.height, info.width):
        note(f"{path}: {height}x{width} (height x width), as it is")
    else:
        how = "centre-cropped" if wanted is None and min(info.height, info.width) >= multiple else "scaled and cropped"
        note(f"{path}: {info.height}x{info.width} (height x width), {how} to {height}x{width}, multiples of {multiple}")
    return Clip(Path(path), height, width, info.fps, frames, info.frames, config.temporal_factor)


def filled(frames: int, factor: int) -> int:
    """Gives the length of a clip once its last frame is repeated to make factor * k + 1."""
    return frames + (1 - frames) % factor


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Reads "256" as the short side and "288x512" as height and width."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,6}(x\d{1,6})?", text):
        raise ValueError(f"--size {text}: expected the short side, as 256, or height x width, as 288x512")
    height, *width = map(int, text.split("x"))
    return (height, width[0]) if width else height


def check_target(path: Path, suffixes: Sequence[str], source: Path) -> None:
    """Raises unless a file with one of these suffixes can be written to `path`, and is not the one that is read."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    files.check_target(path)
    if path.exists() and source.exists() and os.path.samefile(path, source):
        raise ValueError(f"{path}: is the file that is read; write to another one")
