"""Video files in and out through PyAV (FFmpeg), frame by frame; sound is neither read nor written.

T frames, H W pixels, always RGB. A file holds uint8, a model sees float in [-1, 1].
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

SUFFIXES = (".mp4", ".mkv", ".mov")
PathLike = str | os.PathLike[str]
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Upright size in pixels, frames per second (a nominal 25 for an image), frame count if the file states it."""

    width: int
    height: int
    fps: Fraction
    frames: int | None


def probe(path: PathLike) -> VideoInfo:
    """Reads size, rate and length of a clip or image; FileNotFoundError or ValueError where nothing decodes."""
    with _open(path) as (container, stream):
        height, width = _upright_size(next(_decode(path, container, stream)))
        return VideoInfo(width, height, _rate(stream), 1 if _is_image(container) else stream.frames or None)


def read_frames(path: PathLike, size: Size | None = None, frames: int | None = None) -> Iterator[np.ndarray]:
    """Yields the uint8 (H, W, 3) frames of a clip, or the one of an image, upright; at most `frames` of them.

    With `size` = (height, width) a frame is scaled to cover it and centre-cropped; one larger by under a sixteenth on
    both sides is only cropped, and so stays sharp. Without, all get the first one's size. Pixel aspect is ignored.
    A damaged or shortened file gives its frames up to the damage, then ValueError. What goes unseen: up to two frames
    missing at the end, and a cut between two frames in a format that does not state its length (.ts, .gif).
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: expected 1 or more, or None for the whole clip")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size={size}: expected (height, width) of 1 pixel or more")
    _check_source(path)
    return _read(path, size, frames)


def read_clip(path: PathLike, size: Size | None = None, frames: int | None = None) -> np.ndarray:
    """Reads what `read_frames` yields into one uint8 (T, H, W, 3) array."""
    return np.stack(list(read_frames(path, size, frames)))


def fit_size(height: int, width: int, multiple: int, size: int | Size | None = None) -> Size:
    """Gives the (height, width) to bring a clip to: both divisible by `multiple`; what is over is to be cropped.

    `size` is the short side in pixels, or (height, width), or None for the clip's own size. A clip smaller than
    `multiple` is scaled up to it; a smaller `size` is a ValueError.
    """
    if min(height, width, multiple) < 1:
        raise ValueError(f"height={height}, width={width}, multiple={multiple}: expected 1 or more each")
    if size is not None and min((size,) if isinstance(size, int) else size) < multiple:
        raise ValueError(f"size={size}: too small, this model takes multiples of {multiple} pixels from {multiple} on")
    if size is None or isinstance(size, int):
        short = min(height, width)
        scale = Fraction(size or max(short, multiple), short)
        height, width = round(height * scale), round(width * scale)
    else:
        height, width = size
    return height // multiple * multiple, width // multiple * multiple


def to_float(frames: ArrayLike) -> np.ndarray:
    """Maps uint8 frames of any shape to float32 in [-1, 1]: 0 to -1, 255 to 1; ValueError for another dtype."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype}, expected uint8: pixels from 0 to 255")
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(frames: ArrayLike) -> np.ndarray:
    """Maps float frames in [-1, 1] to the nearest uint8 and clips the rest; ValueError for integers and NaN."""
    frames = np.asarray(frames)
    if frames.dtype.kind in "iub":
        raise ValueError(f"frames are {frames.dtype}, expected floats in [-1, 1]")
    frames = frames.astype(np.float32)
    if np.isnan(frames).any():
        raise ValueError("frames hold NaN: the weights are damaged, or their precision overflows; try float32")
    return np.rint((np.clip(frames, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)


class VideoWriter:
    """Writes uint8 RGB frames to an H.264 file that takes its name, or replaces an older one, only when complete.

    `with VideoWriter(path, fps, height, width) as writer: writer.write(frames)`. By default yuv420p, BT.709, CRF 16:
    plays everywhere, needs even sizes. `lossless` is RGB: exact, any size, larger, played by few. ValueError for a
    suffix other than .mp4, .mkv, .mov, or where no frame was written; FileNotFoundError for a missing folder.
    """

    def __init__(self, path: PathLike, fps: Fraction | float, height: int, width: int, lossless: bool = False):
        self.path, self.shape, self.lossless, self.frames = Path(path), (height, width, 3), lossless, 0
        _check_target(self.path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: cannot write '{self.path.suffix}' files; use one of {', '.join(SUFFIXES)}")
        if not 0.001 <= fps <= 1000:
            raise ValueError(f"fps={fps}: expected frames per second from 0.001 to 1000")
        if min(height, width) < 2 or (not lossless and (height % 2 or width % 2)):
            raise ValueError(f"{height}x{width}: yuv420p needs an even height and width; crop, or use lossless=True")
        self.fps = Fraction(fps).limit_denominator(1001)

    def __enter__(self) -> VideoWriter:
        import av

        with contextlib.ExitStack() as stack:
            part = stack.enter_context(replacing(self.path))
            self._container = stack.enter_context(av.open(f"file:{part}", "w"))
            self._stream: Any = self._container.add_stream("libx264rgb" if self.lossless else "libx264", rate=self.fps)
            self._stream.height, self._stream.width, _ = self.shape
            self._stream.pix_fmt = "rgb24" if self.lossless else "yuv420p"
            self._stream.options = {"qp": "0"} if self.lossless else {"crf": "16"}
            if not self.lossless:
                codec = self._stream.codec_context
                codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1  # BT.709, limited
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Appends one uint8 (H, W, 3) frame or several (T, H, W, 3)."""
        if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-3:] != self.shape:
            raise ValueError(f"got {frames.dtype} {frames.shape}, expected uint8 {self.shape}, or several of them")
        for frame in frames.reshape(-1, *self.shape):
            self._container.mux(self._stream.encode(self._picture(frame)))
            self.frames += 1

    def __exit__(self, *exception) -> bool | None:
        return self._stack.__exit__(*exception)

    def _picture(self, pixels):
        import av
        from av.video.reformatter import ColorRange, Colorspace

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if not self.lossless:
            matrix = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
            frame = frame.reformat(format="yuv420p", interpolation=_accurate(), **matrix)
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        return frame

    def _finish(self, failure, *_):
        if failure is None:
            if not self.frames:
                raise ValueError(f"{self.path}: no frame was written, so no file is left; write() at least one")
            self._container.mux(self._stream.encode())


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path`, same suffix; renamed to `path` at a clean exit, removed at any other."""
    _check_target(path)
    part = Path(path).with_name(f".{uuid.uuid4().hex}{Path(path).suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _check_target(path):
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder; add a file name")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}; create it first")


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
    from av.stream import Disposition

    _check_source(path)
    # a title that is not UTF-8 is no reason to refuse the pictures; PyAV 19 lets it pass by itself
    options: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:  # "file:" keeps a name such as a:b.mp4 from being taken for a protocol
        container = av.open(f"file:{os.fspath(path)}", **options)
    except FFmpegError as error:
        raise ValueError(f"{path}: no video or image FFmpeg can read, or cut short ({error.strerror})") from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "an empty container"
            raise ValueError(f"{path}: has no video, only {kinds}; give a file with pictures")
        if streams[0].codec_context is None:
            raise ValueError(f"{path}: this FFmpeg has no decoder for its video; convert it to H.264")
        yield container, streams[0]


def _read(path, size, frames):
    with _open(path) as (container, stream):
        for frame in itertools.islice(_decode(path, container, stream), frames):
            size = size or _upright_size(frame)
            yield _upright_pixels(frame, size)


def _decode(path, container, stream):
    """Yields frames to the first sign of damage, then raises: the decoder itself would go on and make up pixels."""
    from av.error import FFmpegError

    count, end = 0, Fraction(0)
    try:
        for packet in container.demux(stream):
            start = packet.dts if packet.pts is None else packet.pts
            if start is not None:
                end = max(end, (start + packet.duration) * _fraction(packet.time_base))
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
        with contextlib.suppress(FFmpegError):  # whole frames may still wait in the decoder for their turn
            for frame in itertools.takewhile(lambda frame: not frame.is_corrupt, stream.codec_context.decode(None)):
                count += 1
                yield frame
        advice = f"read at most {count} frames, or fetch the file again" if count else "fetch the file again"
        raise ValueError(f"{path}: damaged or cut short after {count} frames ({error}); {advice}") from error


def _stated_end(container, stream):
    """The second at which the stream ends by its header; None where the header is silent and FFmpeg only guesses."""
    if "mp4" in container.format.name and stream.duration:
        return ((stream.start_time or 0) + stream.duration) * _fraction(stream.time_base)
    if "matroska" in container.format.name:
        clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
        return clock and 3600 * int(clock[1]) + 60 * int(clock[2]) + Fraction(clock[3])
    if container.format.name == "avi" and stream.frames:
        return stream.frames / _rate(stream)
    return None


def _is_image(container):
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _is_cut_jpeg(data):
    """FFmpeg paints what is missing grey, so look for the end marker, which cannot occur inside the last scan."""
    return data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def _upright_size(frame):
    return (frame.width, frame.height) if _quarters(frame) % 2 else (frame.height, frame.width)


def _upright_pixels(frame, size):
    height, width = _upright_size(frame)
    scale = max(size[0] / height, size[1] / width)
    if all(0 <= 16 * (have - want) < have for have, want in zip((height, width), size, strict=True)):
        scale = 1
    height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    stored = (width, height) if _quarters(frame) % 2 else (height, width)
    picture = frame.reformat(height=stored[0], width=stored[1], format="rgb24", interpolation=_accurate())
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    pixels = np.rot90(picture.to_ndarray(), _quarters(frame))
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]])


def _quarters(frame):
    return round(frame.rotation / 90)  # counterclockwise, as in np.rot90


def _accurate():
    from av.video.reformatter import Interpolation

    # the default is quicker, and makes 253 of white
    return Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def _fraction(rational):
    return Fraction(rational.numerator, rational.denominator)  # PyAV 19 has a type of its own


def _rate(stream):
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError(f"{stream.container.name}: states no frame rate; convert it to .mp4 first")
    return _fraction(rate)
