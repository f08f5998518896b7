"""Reads video files and images through PyAV (FFmpeg), frame by frame: T frames, H W pixels, always RGB.

PyAV is imported inside functions: this module also loads where it is not installed.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from flax_vae.io.files import PathLike
from flax_vae.io.pixels import Size
from flax_vae.io.video.container import check_source, frame_rate, is_image, opened
from flax_vae.io.video.decode import decode
from flax_vae.io.video.timed import timed
from flax_vae.io.video.upright import Upright

UNREADABLE = (ValueError, OSError)  # what reading raises for a clip that is damaged, missing or no clip


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says of its clip."""

    width: int  # upright, in pixels
    height: int
    fps: Fraction  # frames per second, a nominal 25 for an image
    frames: int | None  # None where the file does not state their number
    sound: tuple[str, ...] = ()  # codecs of its sound tracks
    is_image: bool = False


def probe(path: PathLike) -> VideoInfo:
    """Reads size, rate and length of a clip or image; FileNotFoundError or ValueError where nothing decodes."""
    with opened(path) as (container, stream):
        height, width = Upright(path).size(next(decode(path, container, stream)))
        codecs = [track.codec_context for track in container.streams.audio]
        sound = tuple(codec.name if codec else "unknown" for codec in codecs)
        frames = 1 if is_image(container) else stream.frames or None
        return VideoInfo(width, height, frame_rate(stream), frames, sound, is_image(container))


def read_frames(
    path: PathLike, size: Size | None = None, frames: int | None = None, start: int = 0
) -> Iterator[np.ndarray]:
    """Yields the uint8 (H, W, 3) frames of a clip, or the one of an image, upright.

    What goes unnoticed: up to two frames missing at the end, and a cut between two frames in a format that does not
    state its length (.ts, .gif).

    Args:
      size: (height, width); frames are scaled to cover it and centre-cropped, or only cropped, which keeps them sharp,
        where both sides are larger by under a sixteenth. None: all get the size of the first. Pixel aspect is ignored.
      frames: number to read at most.
      start: number of frames to skip before them.

    Raises:
      FileNotFoundError, ValueError: a missing file; one that is no clip; for a damaged or shortened one, after its last
        whole frame.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: expected 1 or more, or None for the whole clip")
    if start < 0:
        raise ValueError(f"start={start}: expected 0 or more")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size={size}: expected (height, width) of 1 pixel or more")
    check_source(path)
    return _read(path, size, start, None if frames is None else start + frames)


def read_timed(
    path: PathLike, size: Size | None = None, frames: int | None = None, start: int = 0
) -> Iterator[tuple[Fraction, Fraction, np.ndarray]]:
    """Yields the frames of `read_frames`, each with the seconds after the clip's first at which it begins and ends."""
    upright = Upright(path)
    for number, (begin, end, frame) in enumerate(timed(path, None if frames is None else start + frames)):
        size = size or upright.size(frame)
        if number >= start:
            yield begin, end, upright.pixels(frame, size)


def read_clip(path: PathLike, size: Size | None = None, frames: int | None = None) -> np.ndarray:
    """Reads a clip as one uint8 array (T, H, W, 3); arguments and errors are those of `read_frames`."""
    return np.stack(list(read_frames(path, size, frames)))


def _read(path, size, start, end):
    upright = Upright(path)
    with opened(path) as (container, stream):
        for i, frame in enumerate(itertools.islice(decode(path, container, stream), end)):
            size = size or upright.size(frame)
            if i >= start:
                yield upright.pixels(frame, size)
