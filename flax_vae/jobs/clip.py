"""How a job reads its clips: their size, their chunks, and the last frame repeated to fill the last chunk.

T frames, H W pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from flax_vae.io.pixels import fit_size, is_only_cropped, parse_size, to_float
from flax_vae.io.video_reader import probe, read_timed
from flax_vae.io.video_writer import MAX_FPS, MIN_FPS
from flax_vae.jobs.pieces import Chunk, cut_padded
from flax_vae.jobs.screen import counted, note
from flax_vae.models.config import VAEConfig

MAX_SHORT_SIDE = 256  # pixels, where no size is given


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
        """Frames to come, where known."""
        return min((n for n in (self.limit, self.stated) if n is not None), default=None)

    @property
    def expected_latents(self) -> int | None:
        """Latents to come, where known."""
        return (
            None
            if self.expected is None
            else self.config.latent_frames(self.config.fitted_frames(self.expected, "pad"))
        )

    def shape(self, latents: int) -> tuple[int, ...]:
        """Returns the shape (1, T, H, W, C) of a chunk of N latents, or of the first frame for 0."""
        return 1, self.config.chunk_frames(latents), self.height, self.width, self.config.pixel_channels

    @property
    def source(self) -> dict[str, object]:
        """What tells this clip from another: path, size of the file, and when it was last written."""
        status = self.path.stat()
        return {"clip": self.path.absolute(), "bytes": status.st_size, "written": status.st_mtime_ns}

    def chunks(self, latents: int, start: int = 0) -> Iterator[Chunk]:
        """Yields the clip from frame `start` on: its first frame alone, then chunks of N latents.

        Raises ValueError where the clip, or the part of it that is asked for, ends before `start`.
        """
        if self.limit is not None and self.limit <= start:
            raise ValueError(f"--frames {self.limit}: {start} frames are done already; ask for more, or for all")
        spans: deque[tuple[Fraction, Fraction]] = deque()  # of frames that are read ahead

        def frames() -> Iterator[np.ndarray]:
            limit = self.limit and self.limit - start
            for begin, end, pixels in read_timed(self.path, (self.height, self.width), limit, start):
                spans.append((begin, end))
                yield pixels

        number = 0
        for pixels, number, is_last in cut_padded(frames(), self.config.chunk_frames(latents), is_start=start == 0):
            done = -(-number // self.config.temporal_factor)
            begins, ends = zip(*(spans.popleft() for _ in range(number)), strict=True)
            yield Chunk(to_float(pixels)[None], number, done, is_last, (*begins, ends[-1]), pixels[:number])
        if start and not number:
            raise ValueError(f"{self.path}: ends before frame {start}, up to which it was done; it was longer then")

    def report(self, frames: int) -> None:
        """Notes where another number of frames was read than expected, and how many are repeated."""
        if self.limit is not None and frames < self.limit:
            note(f"{self.path} has {counted(frames)}, fewer than the {self.limit} asked for")
        elif frames != (self.expected or frames):
            note(f"{self.path} states {self.stated} frames, but {frames} were read")
        if (whole := self.config.fitted_frames(frames, "pad")) != frames:
            note(
                f"{frames} frames are not {self.config.frame_law()}: the last one is repeated to make {whole}, "
                "and the repeats are cut off after decoding"
            )


def expected_frames(clips: Iterable[Clip]) -> int | None:
    """Returns the frames of all clips together, where known."""
    counts = [clip.expected for clip in clips]
    return None if None in counts else sum(count for count in counts if count is not None)


def open_clip(path: Path, config: VAEConfig, size: str | None, frames: int | None) -> Clip:
    """Probes a clip and chooses its size.

    Args:
      path: video or image.
      config: of the model that will read it.
      size: short side or height x width; None is the clip's own, at most `MAX_SHORT_SIDE`.
      frames: reads at most N.

    Raises:
      ValueError: a model, a size or a number of frames that no clip can have, or a clip that cannot be read.
    """
    multiple = check_reading(config, size, frames)
    wanted, info = parse_size(size), probe(path)
    if wanted is None and min(info.height, info.width) > MAX_SHORT_SIDE:
        wanted = MAX_SHORT_SIDE
    height, width = fit_size(info.height, info.width, multiple, wanted)
    stated = (info.height, info.width)
    how = "centre-cropped" if is_only_cropped(stated, (height, width)) else "scaled and cropped"
    change = "as it is" if (height, width) == stated else f"{how} to {height}x{width}, multiples of {multiple}"
    about = f"{path}: {info.height}x{info.width} (height x width), {change}"
    fps = min(max(info.fps, MIN_FPS), MAX_FPS)  # nominal: frames that are not at this rate keep their own times
    return Clip(path, height, width, fps, frames, info.frames, config, info.is_image, bool(info.sound), about)


def open_entry(kind: str, path: Path, config: VAEConfig, size: str | None, frames: int | None) -> Clip:
    """Opens a "video" or an "image" as `open_clip` does; an APNG or the like that is an image is its first frame."""
    clip = open_clip(path, config, size, 1 if kind == "image" else frames)
    if kind == "image" and not clip.is_image:
        note(f"{path}: holds more than one frame, of which the first is read")
    return clip


def check_reading(config: VAEConfig, size: str | None, frames: int | None) -> int:
    """Returns what sizes are multiples of; ValueError for a model, size or number of frames that no clip can have."""
    check_pixels(config)
    if frames is not None and frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")
    multiple = max(config.spatial_factor, 2)  # H.264 needs even sizes
    fit_size(1, 1, multiple, parse_size(size))
    return multiple


def check_pixels(config: VAEConfig) -> None:
    """Raises ValueError for a model whose pixels are not RGB, as which clips are read and written."""
    if config.pixel_channels != 3:
        raise ValueError(
            f"a {config.class_name} of {config.pixel_channels} channels a pixel: clips are read and written as RGB, "
            "which has 3; encode and decode arrays with flax_vae.from_pretrained"
        )
