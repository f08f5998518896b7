"""Reads how the tiles of a HEIC or AVIF still make one picture, of which PyAV says nothing; no number is trusted.

Cameras cut pictures into a grid of tiles (HEIF, ISO/IEC 23008-12), and FFmpeg makes a stream of each.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from flax_vae.io.files import PathLike
from flax_vae.io.video.exif import MATRICES, UPRIGHT, Matrix

MAX_META = 2**24  # bytes of the box that describes a still
MAX_BOXES = 2**12  # of a file that are looked through; those that say what it is stand in front
MAX_PIXELS = 2**28  # of a picture of tiles
Bytes = bytes | mmap.mmap


@dataclass(frozen=True)
class Grid:
    """A picture of rows x columns of tiles: its size, the ids of their streams row by row, and how it is shown."""

    rows: int
    columns: int
    height: int
    width: int
    tiles: tuple[int, ...]
    matrix: Matrix


def read_grid(path: PathLike) -> Grid | None:
    """Returns the grid of a still of tiles; None for another file. ValueError where what describes it is damaged."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[4:8] != b"ftyp":
            return None
        boxes = {name: (start, end) for name, start, end in islice(_boxes(data, 0, len(data)), MAX_BOXES)}
        start, end = boxes.get(b"meta", (0, 0))
        if b"moov" in boxes or not 4 <= end - start <= MAX_META:
            return None
        try:
            return _grid(data, {name: data[at:to] for name, at, to in _boxes(data, start + 4, end)})
        except (EOFError, KeyError) as error:
            raise ValueError(f"{path}: what says how its tiles make a picture is damaged; fetch it again") from error


def _grid(file: Bytes, meta: dict[bytes, bytes]) -> Grid | None:
    if not {b"pitm", b"iinf"} <= meta.keys():
        return None
    primary = _Fields(meta[b"pitm"]).item()
    if _types(meta[b"iinf"]).get(primary) != b"grid":
        return None
    content = _content(file, meta, primary)
    fields = _Fields(content[:1] + b"\0\0" + content[1:])  # one byte of flags, where boxes have three
    wide = 4 if fields.flags & 1 else 2
    rows, columns, width, height = fields.take(1) + 1, fields.take(1) + 1, fields.take(wide), fields.take(wide)
    tiles = _tiles(meta[b"iref"], primary)
    if len(tiles) != rows * columns or not 0 < height * width <= MAX_PIXELS:
        raise EOFError
    return Grid(rows, columns, height, width, tiles, _matrix(meta[b"iprp"], primary))


class _Fields:
    """Reads the numbers of a box, big-endian, after its version and flags; EOFError where it ends too early."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0
        self.version, self.flags = self.take(1), self.take(3)

    def take(self, size: int) -> int:
        return int.from_bytes(self.raw(size), "big")

    def raw(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise EOFError
        self._at += size
        return self._data[self._at - size : self._at]

    def item(self, wide_from: int = 1) -> int:
        """Takes the number of an item, which is wider from a version of the box on."""
        return self.take(4 if self.version >= wide_from else 2)

    def boxes(self) -> Iterator[tuple[bytes, bytes]]:
        yield from ((name, self._data[at:to]) for name, at, to in _boxes(self._data, self._at, len(self._data)))


def _boxes(data: Bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, start, end) of the boxes that are whole."""
    while end - at >= 8:
        size, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        size = size or end - at
        if not head <= size <= end - at:
            return
        yield name, at + head, at + size
        at += size


def _types(iinf: bytes) -> dict[int, bytes]:
    fields = _Fields(iinf)
    fields.item()  # their number
    types = {}
    for _, content in fields.boxes():
        entry = _Fields(content)
        item, _ = entry.item(wide_from=3), entry.take(2)
        types[item] = entry.raw(4)
    return types


def _content(file: Bytes, meta: dict[bytes, bytes], wanted: int) -> bytes:
    """Returns the bytes of an item, which iloc places in the file or in the box idat."""
    fields = _Fields(meta[b"iloc"])
    sizes = fields.take(2)
    offset, length, base, index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(fields.item(wide_from=2)):
        item = fields.item(wide_from=2)
        method = fields.take(2) & 15 if fields.version else 0
        fields.take(2)  # which file
        start, content = fields.take(base), b""
        for _ in range(fields.take(2)):
            fields.take(index if fields.version else 0)
            at, size = start + fields.take(offset), fields.take(length)
            if item == wanted:
                content += (meta[b"idat"] if method == 1 else file)[at : at + min(size, MAX_META)]
        if item == wanted:
            return content
    raise EOFError


def _tiles(iref: bytes, wanted: int) -> tuple[int, ...]:
    fields = _Fields(iref)
    for name, content in fields.boxes():
        entry = _Fields(iref[:4] + content)  # as wide as iref's version says
        if name == b"dimg" and entry.item() == wanted:
            return tuple(entry.item() for _ in range(entry.take(2)))
    raise EOFError


def _matrix(iprp: bytes, wanted: int) -> Matrix:
    """Returns the product of the rotations and mirrorings of an item."""
    groups = {name: iprp[at:to] for name, at, to in _boxes(iprp, 0, len(iprp))}
    ipco, fields, matrix = groups[b"ipco"], _Fields(groups[b"ipma"]), UPRIGHT
    properties = [(name, ipco[at : at + 1]) for name, at, _ in _boxes(ipco, 0, len(ipco))]
    for _ in range(fields.take(4)):
        item, wide = fields.item(), fields.flags & 1
        for _ in range(fields.take(1)):
            number = fields.take(2) & 0x7FFF if wide else fields.take(1) & 0x7F
            name, value = properties[number - 1] if 0 < number <= len(properties) else (b"", b"")
            if item == wanted and name == b"irot":
                for _ in range(ord(value or b"\0") & 3):
                    matrix = _after(MATRICES[8], matrix)
            if item == wanted and name == b"imir":
                matrix = _after(MATRICES[2 if ord(value or b"\0") & 1 else 4], matrix)
    return matrix


def _after(second: Matrix, first: Matrix) -> Matrix:
    a, b, c, d = first
    e, f, g, h = second
    return e * a + g * b, f * a + h * b, e * c + g * d, f * c + h * d
