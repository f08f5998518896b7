"""Reads video files and images through PyAV (FFmpeg), frame by frame: T frames, H W pixels, always RGB.

PyAV is imported inside functions: this module also loads where it is not installed.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from flax_vae.io.files import PathLike
from flax_vae.io.pixels import Size, is_only_cropped

MAX_STILL = 24 * 60 * 60  # seconds that a frame may stay; what looks longer is a clock that starts anew
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
    with _open(path) as (container, stream):
        height, width = _upright_size(next(_decode(path, container, stream)))
        codecs = [track.codec_context for track in container.streams.audio]
        sound = tuple(codec.name if codec else "unknown" for codec in codecs)
        is_image = _is_image(container)
        frames = 1 if is_image else stream.frames or None
        return VideoInfo(width, height, _rate(stream), frames, sound, is_image)


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
    _check_source(path)
    return _read(path, size, start, None if frames is None else start + frames)


def read_timed(
    path: PathLike, size: Size | None = None, frames: int | None = None, start: int = 0
) -> Iterator[tuple[Fraction, Fraction, np.ndarray]]:
    """Yields the frames of `read_frames`, each with the seconds after the clip's first at which it begins and ends."""
    for number, (begin, end, frame) in enumerate(_timed(path, None if frames is None else start + frames)):
        size = size or _upright_size(frame)
        if number >= start:
            yield begin, end, _upright_pixels(frame, size)


def read_clip(path: PathLike, size: Size | None = None, frames: int | None = None) -> np.ndarray:
    """Reads a clip as one uint8 array (T, H, W, 3); arguments and errors are those of `read_frames`."""
    return np.stack(list(read_frames(path, size, frames)))


def draw_frames(
    path: PathLike,
    frames: int,
    size: Size,
    moment: float = 0.0,
    position: tuple[float, float] = (0.5, 0.5),
    fps: Fraction | float | None = None,
    zoom: float = 1.0,
) -> np.ndarray:
    """Reads frames from anywhere in a clip, as uint8 (T, H, W, 3), upright.

    Args:
      frames: number of frames.
      size: (height, width); frames are scaled to cover it, and cropped.
      moment: 0 for the first frames, near 1 for the last ones.
      position: of the crop, (0, 0) for the top left, (1, 1) for the bottom right.
      fps: the rate to sample frames at, at most the clip's own.
      zoom: scales frames to cover this many times `size`, where they are large enough.

    Raises:
      ValueError: a clip that is damaged there, or too short.
    """
    with _open(path) as (container, stream):
        rate = _rate(stream)
        pace = max(rate / Fraction(fps or rate), Fraction(1))  # frames of the clip for one that is drawn
        offsets = [math.floor(i * pace) for i in range(frames)]
        span = offsets[-1] + 1
        count = 1 if _is_image(container) else _frame_count(container, stream)
        if count < span:
            raise ValueError(f"{path}: has {count} frames, and {span} are needed for {frames} at this rate")
        first = min(math.floor(moment * (count - span + 1)), count - span)
        begin, tick = stream.start_time or 0, as_fraction(stream.time_base)
        if first:
            container.seek(begin + round(first / rate / tick), stream=stream)
        drawn: list[np.ndarray] = []
        for number, frame in enumerate(_decode(path, container, stream)):
            if frame.pts is not None:  # after a seek only its time tells a frame's number in the clip
                number = round((frame.pts - begin) * tick * rate)
            while len(drawn) < frames and number >= first + offsets[len(drawn)]:
                drawn.append(_upright_pixels(frame, size, position, zoom))
            if len(drawn) == frames:
                return np.stack(drawn)
        raise ValueError(f"{path}: damaged or cut short, {len(drawn)} of the frames from {first} on can be read")


def _frame_count(container, stream):
    """Counts frames: as stated, by the stated length, or by reading through the file."""
    if stream.frames:
        return stream.frames
    if (stated := _stated_end(container, stream)) is not None:
        return math.floor(stated * _rate(stream))
    count = sum(packet.size > 0 for packet in container.demux(stream))
    container.seek(0)
    return count


def accurate():
    """Returns how to convert between RGB and YUV: the default is faster, and turns white into 253."""
    from av.video.reformatter import Interpolation

    return Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def _check_source(path):
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file; give the path of one video or image")
    if not os.path.getsize(path):
        raise ValueError(f"{path}: the file is empty; fetch or write it again")


@contextlib.contextmanager
def _open(path):
    import av
    from av.error import FFmpegError

    _check_source(path)
    # a title that is not UTF-8 must not make the pictures unreadable; PyAV 19 replaces its bytes by itself
    options: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:  # "file:" keeps a name such as a:b.mp4 from being taken for a protocol
        container = av.open(f"file:{os.fspath(path)}", **options)
    except FFmpegError as error:
        raise ValueError(f"{path}: no video or image FFmpeg can read, or cut short ({error.strerror})") from error
    with container:
        streams = pictures(container)
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "an empty container"
            raise ValueError(f"{path}: has no video, only {kinds}; give a file with pictures")
        if streams[0].codec_context is None:
            raise ValueError(f"{path}: this FFmpeg has no decoder for its video; convert it to H.264")
        yield container, streams[0]


def _read(path, size, start, end):
    with _open(path) as (container, stream):
        for i, frame in enumerate(itertools.islice(_decode(path, container, stream), end)):
            size = size or _upright_size(frame)
            if i >= start:
                yield _upright_pixels(frame, size)


def _timed(path, limit):
    """Yields frames, at most N, with their times; a frame ends where the next begins, the last where the file says."""
    with _open(path) as (container, stream):
        frames, zero, end, held = _decode(path, container, stream), None, Fraction(0), None
        for number in itertools.count():
            try:
                frame = next(frames, None)
            except ValueError:
                if held:
                    yield held[0], end, held[1]
                if number == limit:
                    return
                raise
            if frame is None:
                stated = _stated_end(container, stream)
                if held:
                    yield held[0], end if stated is None or zero is None else max(end, stated - zero), held[1]
                return
            time = None if frame.pts is None else frame.pts * as_fraction(frame.time_base)
            if time is not None and (zero is None or (held and not held[0] < time - zero < end + MAX_STILL)):
                zero = time - end  # the first frame, or a clock that starts anew
            begin = end if time is None else time - zero
            if held:
                yield held[0], begin, held[1]
            if number == limit:
                return
            held = begin, frame
            stays = (frame.duration or 0) * as_fraction(frame.time_base)
            end = begin + (stays if 0 < stays < MAX_STILL else 1 / _rate(stream))


def _decode(path, container, stream):
    """Yields frames up to the first sign of damage, then raises: the decoder itself would go on and invent pixels."""
    from av.error import FFmpegError

    count, end = 0, Fraction(0)
    try:
        for packet in container.demux(stream):
            start = packet.dts if packet.pts is None else packet.pts
            if start is not None:
                end = max(end, (start + packet.duration) * as_fraction(packet.time_base))
            if packet.is_corrupt or (_is_image(container) and _is_cut_jpeg(bytes(packet))):
                raise ValueError("a packet is incomplete")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError("a frame is incomplete")
                count += 1
                yield frame
        if not count:
            raise ValueError("no frame decodes")
        stated = _stated_end(container, stream)
        if stated is not None and stated - end > 2 / _rate(stream):
            raise ValueError(f"{float(stated):.2f} s long by its header, but ends at {float(end):.2f} s")
    except (FFmpegError, ValueError) as error:
        with contextlib.suppress(FFmpegError):  # the decoder may hold back whole frames, to reorder them
            for frame in itertools.takewhile(lambda frame: not frame.is_corrupt, stream.codec_context.decode(None)):
                count += 1
                yield frame
        advice = f"read at most {count} frames, or fetch the file again" if count else "fetch the file again"
        raise ValueError(f"{path}: damaged or cut short after {count} frames ({error}); {advice}") from error


def _stated_end(container, stream):
    """Returns the second at which the stream ends by its header; None where FFmpeg would only estimate it."""
    if "mp4" in container.format.name and stream.duration:
        return ((stream.start_time or 0) + stream.duration) * as_fraction(stream.time_base)
    if "matroska" in container.format.name:
        clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
        return clock and 3600 * int(clock[1]) + 60 * int(clock[2]) + Fraction(clock[3])
    if container.format.name == "avi" and stream.frames:
        return stream.frames / _rate(stream)
    return None


def _is_image(container):
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _is_cut_jpeg(data):
    """Whether the end marker, which cannot occur inside a scan, is missing: FFmpeg fills what is cut off with grey."""
    return data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def _upright_size(frame):
    return (frame.width, frame.height) if _quarters(frame) % 2 else (frame.height, frame.width)


def _upright_pixels(frame, size, position=(0.5, 0.5), zoom=1.0):
    height, width = _upright_size(frame)
    cover = max(size[0] / height, size[1] / width)
    scale = 1 if is_only_cropped((height, width), size) else max(cover, min(cover * zoom, 1))
    height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    stored = (width, height) if _quarters(frame) % 2 else (height, width)
    picture = frame.reformat(height=stored[0], width=stored[1], format="rgb24", interpolation=accurate())
    top, left = (int(at * (have - want)) for at, have, want in zip(position, (height, width), size, strict=True))
    pixels = np.rot90(picture.to_ndarray(), _quarters(frame))
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]])


def _quarters(frame):
    return round(frame.rotation / 90)  # counterclockwise, as in np.rot90


def pictures(container: Any) -> list[Any]:
    """Lists the video streams of a PyAV container, without pictures that are covers of sound; the first one is read."""
    from av.stream import Disposition

    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def as_fraction(rational: Any) -> Fraction:
    """Converts a fraction of PyAV."""
    return Fraction(rational.numerator, rational.denominator)  # PyAV 19 has a type of its own


def _rate(stream):
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError(f"{stream.container.name}: states no frame rate; convert it to .mp4 first")
    return as_fraction(rate)
