"""Finds the orientation that EXIF states in a still: JPEG, PNG, WebP or TIFF; no number in the bytes is trusted."""

import mmap
import re
from collections.abc import Iterator

from flax_vae.io.files import PathLike

Matrix = tuple[int, int, int, int]  # of signs (a, b, c, d): the pixel at (x, y) is shown at (a x + c y, b x + d y)
UPRIGHT: Matrix = (1, 0, 0, 1)
MATRICES: dict[int, Matrix] = {  # by EXIF's numbers
    1: UPRIGHT,
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
ORIENTATION = 0x0112  # its tag in TIFF
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # without those that a scan may hold
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
Bytes = bytes | mmap.mmap


def still_matrix(path: PathLike) -> Matrix | None:
    """Returns how a JPEG, PNG, WebP or TIFF is to be shown; None for other files."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        blocks = _exif_blocks(data)
        return None if blocks is None else MATRICES.get(next(map(_orientation, blocks), 1), UPRIGHT)


def _exif_blocks(data: Bytes) -> Iterator[Bytes] | None:
    if data[:2] == b"\xff\xd8":
        return (block[6:] for marker, block in jpeg_segments(data) if marker == 0xE1 and block[:6] == b"Exif\0\0")
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_chunks(data, b"eXIf")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return (block.removeprefix(b"Exif\0\0") for block in _riff_chunks(data, b"EXIF"))
    if data[:4] in (b"II*\0", b"MM\0*"):
        return iter([data])
    return None


def jpeg_segments(data: Bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (marker, content) of the segments of a JPEG, up to the end of the image."""
    at = 2
    while marker := JPEG_MARKER.search(data, at):
        code, at = marker[1][0], marker.end()
        if code in (0x01, 0xD8):  # stand alone
            continue
        length = 0 if code == END_OF_IMAGE else int.from_bytes(data[at : at + 2], "big")
        yield code, data[at + 2 : at + length]
        if code == END_OF_IMAGE:
            return
        at += length


def is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker: FFmpeg fills what is cut off with grey."""
    return data[:2] == b"\xff\xd8" and all(marker != END_OF_IMAGE for marker, _ in jpeg_segments(data))


def _png_chunks(data: Bytes, name: bytes) -> Iterator[bytes]:
    at = 8
    while len(head := data[at : at + 8]) == 8:
        end = at + 8 + int.from_bytes(head[:4], "big")
        if head[4:] == name:
            yield data[at + 8 : end]
        at = end + 4  # its checksum


def _riff_chunks(data: Bytes, name: bytes) -> Iterator[bytes]:
    at = 12
    while len(head := data[at : at + 8]) == 8:
        end = at + 8 + int.from_bytes(head[4:], "little")
        if head[:4] == name:
            yield data[at + 8 : end]
        at = end + end % 2


def _orientation(tiff: Bytes) -> int:
    """Returns the orientation in the first directory of a TIFF file or block; 1, upright, where it states none."""
    order = "big" if tiff[:2] == b"MM" else "little"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == ORIENTATION:
            return number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
    return 1
