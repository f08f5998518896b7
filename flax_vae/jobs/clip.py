"""How a job reads its clips: at which size, in which chunks, and with which frames repeated to fill the last one.

T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.jobs.pieces import Chunk, marked
from flax_vae.jobs.screen import counted, note

if TYPE_CHECKING:
    from flax_vae.models.config import VAEConfig

SHORT_SIDE = 256  # of larger clips, where no size is asked for


@dataclass(frozen=True)
class Clip:
    """A video or image, the size to read it at, and the most frames to read; `stated` is what its header promises."""

    path: Path
    height: int
    width: int
    fps: Fraction
    limit: int | None
    stated: int | None
    config: VAEConfig
    is_image: bool
    has_sound: bool
    about: str  # what is done to its size

    @property
    def expected(self) -> int | None:
        """Frames to come, if known."""
        return min((n for n in (self.limit, self.stated) if n is not None), default=None)

    @property
    def expected_latents(self) -> int | None:
        """Latents to come, if known."""
        return None if self.expected is None else self.config.latent_frames(filled(self.expected, self.config))

    def shape(self, latents: int) -> tuple[int, ...]:
        """Returns the shape of a chunk that becomes so many latents, or of the first frame for 0."""
        return 1, self.config.chunk_frames(latents), self.height, self.width, self.config.pixel_channels

    @property
    def source(self) -> dict[str, object]:
        """What tells this clip from another: where the file is, how large, and when it was last written."""
        status = self.path.stat()
        return {"clip": self.path.absolute(), "bytes": status.st_size, "written": status.st_mtime_ns}

    def chunks(self, latents: int, start: int = 0) -> Iterator[Chunk]:
        """Yields the clip from frame `start` on: its first frame alone, then as many frames as give `latents`.

        The last chunk is filled by repeating its last frame: a shape of its own would be compiled for it alone.
        Raises ValueError when the clip, or the part of it that is asked for, ends before `start`.
        """
        from flax_vae.io.pixels import to_float
        from flax_vae.io.video_reader import read_frames
        from flax_vae.runtime.stream import cut

        if self.limit is not None and self.limit <= start:
            raise ValueError(f"--frames {self.limit}: {start} frames are done already; ask for more, or for all")
        size, number = self.config.chunk_frames(latents), start
        frames = read_frames(self.path, (self.height, self.width), self.limit and self.limit - start, start)
        for pixels, is_last in marked(cut(frames, size, first=size if start else 1)):
            length = len(pixels)
            whole = length + (-length % size if number else 0)
            data = np.concatenate([pixels, np.repeat(pixels[-1:], whole - length, axis=0)])
            done = -(-length // self.config.temporal_factor)
            yield Chunk(to_float(data)[None], length, done, is_last, pixels)
            number += length
        if number == start and start:
            raise ValueError(f"{self.path}: ends before frame {start}, up to which it was done; it was longer then")

    def report(self, frames: int) -> None:
        """Says what has become of the number of frames, once `frames` have been read."""
        if self.limit is not None and frames < self.limit:
            note(f"{self.path} has {counted(frames)}, fewer than the {self.limit} asked for")
        elif frames != (self.expected or frames):
            note(f"{self.path} states {self.stated} frames, but {frames} were read")
        if (whole := filled(frames, self.config)) != frames:
            note(
                f"{frames} frames are not {self.config.frame_law()}: the last one is repeated to make {whole}, "
                "and the repeats are cut off after decoding"
            )


def expected(clips: Iterable[Clip]) -> int | None:
    """Gives the frames of all clips together, if known."""
    counts = [clip.expected for clip in clips]
    return None if None in counts else sum(count for count in counts if count is not None)


def open_clip(path: Path, config: VAEConfig, size: str | None, frames: int | None) -> Clip:
    """Finds out what a clip holds and decides its size; ValueError for a clip or size that will not do."""
    from flax_vae.io.pixels import fit_size, is_only_cropped, parse_size
    from flax_vae.io.video_reader import probe

    if frames is not None and frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")
    wanted = parse_size(size)
    info = probe(path)
    multiple = max(config.spatial_factor, 2)  # and H.264 needs even sizes
    if wanted is None and min(info.height, info.width) > SHORT_SIDE:
        wanted = SHORT_SIDE
    height, width = fit_size(info.height, info.width, multiple, wanted)
    is_sharp = is_only_cropped((info.height, info.width), (height, width))
    changed = f"{'centre-cropped' if is_sharp else 'scaled and cropped'} to {height}x{width}"
    fits = (height, width) == (info.height, info.width)
    about = "as it is" if fits else f"{changed}, multiples of {multiple}"
    about = f"{path}: {info.height}x{info.width} (height x width), {about}"
    return Clip(path, height, width, info.fps, frames, info.frames, config, info.is_image, bool(info.sound), about)


def filled(frames: int, config: VAEConfig) -> int:
    """Returns the length of a clip once its last frame is repeated to make whole latents."""
    return config.fitted_frames(frames, "pad")
