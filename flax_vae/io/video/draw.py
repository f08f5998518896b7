"""Draws frames from anywhere in a clip: those in a row that decoding the whole clip would give, without decoding it."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from flax_vae.io.files import PathLike
from flax_vae.io.pixels import Size
from flax_vae.io.video.container import check_source, frame_rate, opened
from flax_vae.io.video.decode import decode
from flax_vae.io.video.frame_index import FrameIndex, Start, accounts
from flax_vae.io.video.upright import Upright

Shown = Callable[[Any], np.ndarray]  # turns a frame of PyAV into pixels


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
    check_source(path)
    kept, offsets = accounts(path), _offsets(path, frames, fps)
    shown = partial(Upright(path).pixels, size=size, position=position, zoom=zoom)
    span = offsets[-1] + 1
    while True:
        index = kept.index
        if index.count >= span:
            first = min(math.floor(moment * (index.count - span + 1)), index.count - span)
            with contextlib.suppress(_Contradicted):
                return np.stack(_picked(path, index, [first + offset for offset in offsets], shown))
        if index.times is None:  # they are counted, so that there are no more
            raise ValueError(f"{path}: has {index.count} frames, and {span} are needed for {frames} at this rate")
        if index is kept.index:  # otherwise another thread has turned to the next account
            kept.turn()


class _Contradicted(ValueError):
    """The frames that are decoded are others than an index lists."""


def _offsets(path: PathLike, frames: int, fps: Fraction | float | None) -> list[int]:
    if fps is None:
        return list(range(frames))
    with opened(path) as (_, stream):
        pace = max(frame_rate(stream) / Fraction(fps), Fraction(1))  # frames of the clip for one that is drawn
    return [math.floor(i * pace) for i in range(frames)]


def _picked(path: PathLike, index: FrameIndex, numbers: list[int], shown: Shown) -> list[np.ndarray]:
    """Decodes the frames with these numbers, from the nearest place where that can begin, at worst from the start."""
    for start in index.starts(numbers[0]):
        with contextlib.suppress(ValueError):  # a place where decoding cannot begin looks like damage
            return _from(path, index, numbers, shown, start)
    return _from(path, index, numbers, shown, None)


def _from(path: PathLike, index: FrameIndex, numbers: list[int], shown: Shown, start: Start | None) -> list[np.ndarray]:
    with _packets(path, start) as (container, stream, packets, time):
        before = index.number(time) if start else 0
        if before is None:
            raise _Contradicted
        picked: list[np.ndarray] = []
        for number, frame in _numbered(decode(path, container, stream, packets, before), index, before):
            if number == numbers[len(picked)]:
                picked.append(shown(frame))
            if len(picked) == len(numbers):
                return picked
    raise _Contradicted


def _numbered(frames: Iterable[Any], index: FrameIndex, before: int) -> Iterator[tuple[int, Any]]:
    """Yields frames with their numbers in the clip, from `before` on; `_Contradicted` where one is not as listed."""
    times = index.times
    if times is None:
        yield from enumerate(frames)
        return
    # those that are shown before the first but follow it in the file refer to what was not decoded
    due = itertools.dropwhile(lambda frame: frame.pts is not None and frame.pts < times[before], frames)
    for number, frame in enumerate(due, before):
        if number >= index.count or frame.pts != times[number]:
            raise _Contradicted
        yield number, frame


@contextlib.contextmanager
def _packets(path: PathLike, start: Start | None) -> Iterator[tuple[Any, Any, Iterable[Any], int | None]]:
    """Opens a file as (container, stream, packets from a key frame on, the time stamp of the first)."""
    from av.error import FFmpegError

    if start is None:
        with opened(path) as (container, stream):
            yield container, stream, container.demux(stream), None
        return
    for is_sought in (True, False):
        with opened(path) as (container, stream):
            try:
                if is_sought:
                    container.seek(start.seek, stream=stream)
                packets = container.demux(stream)
                key = _find_key(packets, start)
            except FFmpegError:
                continue  # some formats cannot be sought in
            if key is not None:
                yield container, stream, itertools.chain([key], packets), key.pts
                return
    raise _Contradicted


def _find_key(packets: Iterable[Any], start: Start) -> Any:
    """Returns the first key frame that may begin; None where the seek has landed behind it."""
    for packet in packets:
        if packet.is_keyframe and packet.pts is not None and packet.pts >= start.lowest:
            return packet if packet.pts <= start.highest else None
    return None
