"""Reads animated WebP, which FFmpeg cannot: it decodes each picture alone, and they are laid over each other here.

`Animation` stands for both the container and the stream of PyAV, as far as this package reads them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from flax_vae.io.files import PathLike
from flax_vae.io.video.upright import accurate

MAX_PIXELS = 2**28  # of the picture
TICK = Fraction(1, 1000)  # seconds


def is_animation(path: PathLike) -> bool:
    """Whether a file is a WebP that says that it is animated."""
    with open(path, "rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == 21 and bool(head[20] & 2)


class Animation:
    """An animated WebP, with what is read of a container and of a stream; ValueError where its size is impossible."""

    type, start_time, time_base, disposition, guessed_rate = "video", 0, TICK, 0, Fraction(10)

    def __init__(self, path: PathLike):
        self.name, self._data = str(path), Path(path).read_bytes()
        self.width, self.height = (1 + int.from_bytes(self._data[at : at + 3], "little") for at in (24, 27))
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"{path}: {self.height}x{self.width}: expected at most {MAX_PIXELS:,} pixels")
        durations = [_number(chunk, 12) for name, chunk, _ in _chunks(self._data, 12) if name == b"ANMF"]
        self.frames, self.duration = len(durations), sum(durations)
        self.average_rate = self.frames / (self.duration * TICK) if self.duration else None
        self.format, self.metadata, self.container = SimpleNamespace(name="webp"), {}, self
        self.streams = SimpleNamespace(video=(self,), audio=())
        self.codec_context = SimpleNamespace(decode=lambda packet: [])

    def demux(self, _stream: Any) -> Iterator["_Picture"]:
        """Yields the pictures; each is decoded after the one before it. ValueError where the file is cut short."""
        canvas, time = np.zeros((self.height, self.width, 4), np.uint8), 0
        for name, chunk, is_whole in _chunks(self._data, 12):
            if not is_whole:
                raise ValueError("it ends within a picture")
            if name == b"ANMF":
                yield _Picture(chunk, canvas, time)
                time += _number(chunk, 12)

    def seek(self, *_: Any, **__: Any) -> None:
        """Does nothing: decoding begins with the first picture."""


@dataclass
class _Picture:
    """What is read of a packet; `canvas` (H, W, RGBA) is what the pictures before have left."""

    data: bytes
    canvas: np.ndarray
    pts: int
    is_corrupt = is_discard = False
    time_base, pos = TICK, None

    @property
    def dts(self) -> int:
        return self.pts

    @property
    def is_keyframe(self) -> bool:
        return self.pts == 0

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def duration(self) -> int:
        return _number(self.data, 12)

    def decode(self) -> list[Any]:
        import av

        pixels, flags = _still(self.data[16:]), self.data[15]
        left, top = 2 * _number(self.data, 0), 2 * _number(self.data, 3)
        under = self.canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]]
        if under.shape != pixels.shape:
            raise ValueError("a picture lies outside of the canvas")
        under[:] = pixels if flags & 2 else _blended(pixels, under)
        frame = av.VideoFrame.from_ndarray(self.canvas, format="rgba")
        frame.pts, frame.time_base = self.pts, TICK
        if flags & 1:
            under[:] = 0  # what comes next is laid over nothing
        return [frame]


def _chunks(data: bytes, at: int) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yields (name, content, whether it is whole) of the chunks of a RIFF file."""
    while len(head := data[at : at + 8]) == 8:
        end = at + 8 + int.from_bytes(head[4:], "little")
        yield head[:4], data[at + 8 : end], end <= len(data)
        at = end + end % 2


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _still(chunks: bytes) -> np.ndarray:
    """Decodes a picture, the chunks of a still without its header, to RGBA."""
    import av

    names = [name for name, *_ in _chunks(chunks, 0)]
    head = b""
    if names[:1] == [b"ALPH"]:  # stands in files with a header of their own; the size follows from the picture
        key = chunks.index(b"\x9d\x01\x2a") + 3
        sides = [int.from_bytes(chunks[at : at + 2], "little") & 0x3FFF for at in (key, key + 2)]
        head = b"VP8X\x0a\0\0\0\x10\0\0\0" + b"".join((side - 1).to_bytes(3, "little") for side in sides)
    still = b"RIFF" + (len(head + chunks) + 4).to_bytes(4, "little") + b"WEBP" + head + chunks
    decoder: Any = av.CodecContext.create("webp", "r")
    frames = [*decoder.decode(av.Packet(still)), *decoder.decode(None)]
    if not frames:
        raise ValueError("a picture does not decode")
    return frames[0].reformat(format="rgba", interpolation=accurate()).to_ndarray()


def _blended(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Lays RGBA over RGBA, neither multiplied by its alpha."""
    above = over[..., 3:].astype(np.float32) / 255
    below = under[..., 3:].astype(np.float32) / 255 * (1 - above)
    alpha = above + below
    colour = (over[..., :3] * above + under[..., :3] * below) / np.maximum(alpha, 1e-6)
    return np.rint(np.concatenate([colour, 255 * alpha], axis=-1)).astype(np.uint8)
