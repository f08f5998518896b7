"""Decodes the frames of a file up to the first sign of damage: FFmpeg's decoders would go on and invent pixels."""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

from flax_vae.io.files import PathLike
from flax_vae.io.video import matroska
from flax_vae.io.video.container import as_fraction, frame_rate, is_image, stated_end
from flax_vae.io.video.exif import is_cut_jpeg
from flax_vae.io.video.heif import read_grid
from flax_vae.io.video.mpegts import is_joined_at
from flax_vae.io.video.tiles import composed


def decode(
    path: PathLike, container: Any, stream: Any, packets: Iterable[Any] | None = None, before: int = 0
) -> Iterator[Any]:
    """Yields the frames of PyAV, then raises ValueError where the file is damaged or ends too early.

    Args:
      path: names the file in errors.
      container, stream: of `opened`.
      packets: of the stream, from a key frame on; None for all of them.
      before: number of frames before these packets.
    """
    from av.error import FFmpegError

    count = before
    try:
        for frame in _whole(path, container, stream, container.demux(stream) if packets is None else packets):
            count += 1
            yield frame
    except (FFmpegError, ValueError, IndexError) as error:  # IndexError: PyAV has no stream for a packet
        with contextlib.suppress(FFmpegError):  # the decoder may hold back whole frames, to reorder them
            for frame in itertools.takewhile(lambda frame: not frame.is_corrupt, stream.codec_context.decode(None)):
                frame.time_base, count = stream.time_base, count + 1
                yield frame
        advice = f"read at most {count} frames, or fetch the file again" if count else "fetch the file again"
        raise ValueError(f"{path}: damaged or cut short after {count} frames ({error}); {advice}") from error


def _whole(path: PathLike, container: Any, stream: Any, packets: Iterable[Any]) -> Iterator[Any]:
    """Yields frames; ValueError at what is incomplete, and where the header states a later end."""
    if grid := read_grid(path):
        yield composed(container, grid)
        return
    last, end, single = None, Fraction(0), is_image(container)
    for packet in (ahead := _Ahead(packets)):
        start = packet.dts if packet.pts is None else packet.pts
        if start is not None:
            end = max(end, (start + (packet.duration or 0)) * as_fraction(packet.time_base))
        if packet.is_corrupt and not _is_joined(path, ahead.second()):
            raise ValueError("a packet is incomplete")
        if single and is_cut_jpeg(bytes(packet)):
            raise ValueError("a packet is incomplete")
        if not packet.size and packet.pts is not None and last is not None:
            last.pts = packet.pts  # the last frame is shown once more; a decoder would take this for the end
            yield last
            continue
        for last in packet.decode():
            if last.is_corrupt:
                raise ValueError("a frame is incomplete")
            yield last
            if single:
                return  # whatever stands behind it: phones append a video
    if last is None:
        raise ValueError("no frame decodes")
    stated = _due(path, container, stream)
    if stated is not None and stated - end > 2 / frame_rate(stream) and not _is_whole(path, container):
        raise ValueError(f"{float(stated):.2f} s long by its header, but ends at {float(end):.2f} s")


def _due(path: PathLike, container: Any, stream: Any) -> Fraction | None:
    """Returns the second that the packets have to reach; None where the file does not say."""
    stated = stated_end(container, stream)
    if stated is None and "matroska" in container.format.name and container.duration and matroska.is_cut(path):
        return Fraction(container.duration, 10**6)  # of all tracks; that of one stands behind them, or nowhere
    return stated


def _is_whole(path: PathLike, container: Any) -> bool:
    """Whether a file has all of its packets, though they seem to end early: not each tells how long its frame stays."""
    return "matroska" in container.format.name and matroska.is_whole(path)


def _is_joined(path: PathLike, second: Any) -> bool:
    """Whether MPEG-TS counters jump because another file begins: that marks the last packet but one before it."""
    return second is not None and second.is_keyframe and is_joined_at(path, second.pos)


class _Ahead:
    """Iterates over packets, of which those to come can be looked at."""

    def __init__(self, packets: Iterable[Any]):
        self._packets, self._ahead = iter(packets), deque[Any]()

    def __iter__(self) -> Iterator[Any]:
        while True:
            packet = self._ahead.popleft() if self._ahead else next(self._packets, None)
            if packet is None:
                return
            yield packet

    def second(self) -> Any:
        """Returns the next packet but one; None where there is none."""
        while len(self._ahead) < 2:
            self._ahead.append(next(self._packets, None))
        return self._ahead[1]
