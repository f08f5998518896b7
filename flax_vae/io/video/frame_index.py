"""Accounts of the frames of a clip: the time stamps at which they are shown, in order, and where decoding may begin."""

import array
import bisect
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flax_vae.io.files import PathLike
from flax_vae.io.video.container import is_image, opened
from flax_vae.io.video.decode import decode

INDEXED_FILES = 128  # whose accounts a process keeps: 8 bytes a frame, where frames are not evenly spaced
KEYS_TRIED = 2
MAX_REORDERED = 16  # frames by which H.264 and HEVC may decode one before it is shown


class Start(NamedTuple):
    """Where to seek, and the time stamps that a key frame may have to begin from."""

    seek: int
    lowest: int
    highest: int


@dataclass(frozen=True)
class FrameIndex:
    """The number of frames shown; their time stamps, ascending, and {time: decoding time} of keys.

    Without time stamps, None, the number is exact, and frames are counted from the start of the file.
    """

    count: int
    times: Sequence[int] | None = None
    keys: Mapping[int, int] | None = None

    def number(self, time: int | None) -> int | None:
        """Returns the number of the frame with this time stamp; None where there is none."""
        times = self.times or ()
        at = len(times) if time is None else bisect.bisect_left(times, time)
        return at if at < len(times) and times[at] == time else None

    def starts(self, number: int) -> list[Start]:
        """Lists where decoding may begin to reach frame `number`, the best first, but for the start of the file."""
        if self.times is None or number == 0:
            return []
        first, wanted = self.times[0], self.times[number]
        if self.keys is None:  # a seek goes by decoding times, which are earlier than those of showing
            return [Start(seek, first, wanted) for seek in (wanted, self.times[max(number - MAX_REORDERED, 0)])]
        # The last key frame, and the one before: one that begins a slow refresh shows nothing until that is complete.
        last = sorted(key for key in self.keys if first < key <= wanted)[: -KEYS_TRIED - 1 : -1]
        return [Start(self.keys[key], key, key) for key in last]


class Accounts:
    """Indexes of one file, the cheapest first: the next is taken where decoding contradicts one; the last is exact."""

    def __init__(self, path: PathLike):
        self._path, self._left = path, [_stated, _demuxed, _decoded]
        self.index = self._next()

    def turn(self) -> None:
        """Takes the next account that the file has."""
        self.index = self._next()

    def _next(self) -> FrameIndex:
        while True:
            account = self._left[0]
            self._left = self._left[1:] or self._left
            if index := account(self._path):
                return index


def accounts(path: PathLike) -> Accounts:
    """Returns the accounts of a file, those kept from before where it has not changed."""
    status = os.stat(path)
    return _accounts(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(INDEXED_FILES)
def _accounts(path: str, _size: int, _written: int) -> Accounts:
    return Accounts(path)


def _stated(path: PathLike) -> FrameIndex | None:
    """Reads the index of an MP4 whose frames are evenly spaced, which takes no reading of the frames."""
    with opened(path) as (container, stream):
        if is_image(container):
            return FrameIndex(1)
        entries = list(getattr(stream, "index_entries", ()))  # PyAV lists them from version 16 on
        if "mp4" not in container.format.name or len(entries) != stream.frames or stream.start_time is None:
            return None
        decoding = [entry.timestamp for entry in entries if not entry.is_discard]
        times = _compact([stream.start_time - decoding[0] + time for time in decoding] if decoding else [])
        return FrameIndex(len(times), times) if isinstance(times, range) and times else None


def _demuxed(path: PathLike) -> FrameIndex | None:
    """Reads the time stamps of all packets, without decoding them."""
    from av.error import FFmpegError

    stamps = []
    with opened(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size or packet.pts is not None:
                    stamps.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
        except (FFmpegError, IndexError):  # IndexError: PyAV has no stream for a packet
            return None
    # A recording may begin in the middle: what comes before the first key frame, or is shown before, does not decode.
    begin = next((number for number, (_, _, is_key, _) in enumerate(stamps) if is_key), len(stamps))
    stamps = stamps[begin:]
    if not stamps or any(pts is None for pts, *_ in stamps):
        return None
    shown = [stamp for stamp in stamps if stamp[0] >= stamps[0][0] and not stamp[3]]
    times = sorted(pts for pts, *_ in shown)
    if not times or len(set(times)) < len(times):
        return None
    keys = {pts: pts if dts is None else dts for pts, dts, is_key, _ in shown if is_key}
    return FrameIndex(len(times), _compact(times), keys)


def _decoded(path: PathLike) -> FrameIndex:
    """Counts the frames by decoding all of them."""
    with opened(path) as (container, stream):
        return FrameIndex(sum(1 for _ in decode(path, container, stream)))


def _compact(times: list[int]) -> Sequence[int]:
    """Returns ascending numbers as a range where they are evenly spaced, otherwise as an array of 8 bytes each."""
    if len(times) < 2:
        return times
    step = times[1] - times[0]
    even = range(times[0], times[0] + step * len(times), step) if step > 0 else range(0)
    return even if list(even) == times else array.array("q", times)
