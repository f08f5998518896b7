"""Tells whether Matroska and WebM files are whole: FFmpeg takes the end of the file for the end of the clip.

Such a file is a tree of elements, each a name, a size and content; those of frames stand in clusters of the segment.
"""

import mmap
from collections.abc import Iterator

from flax_vae.io.files import PathLike

SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
Element = tuple[bytes, int, int]  # name, where its content begins, and where that ends


def is_cut(path: PathLike) -> bool:
    """Whether the file is shorter than it says; one that does not say, as a live recording, is not."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(end > len(data) for _, _, end in _elements(data, 0, len(data)))


def is_whole(path: PathLike) -> bool:
    """Whether each element of the file, down to those of frames, ends where another begins, up to the end of all."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _is_whole(data, 0, len(data), (SEGMENT, CLUSTER))


def _is_whole(data: mmap.mmap, at: int, end: int, opened: tuple[bytes, ...]) -> bool:
    """Whether elements fill the bytes from `at` to `end`; also those in what is named first, and so on."""
    reached = at
    for name, begin, reached in _elements(data, at, end):
        if reached > end or (name in opened[:1] and not _is_whole(data, begin, reached, opened[1:])):
            return False
    return reached == end


def _elements(data: mmap.mmap, at: int, end: int) -> Iterator[Element]:
    """Yields the elements that follow each other from `at` on, up to one that is none, or whose size is unknown."""
    while at < end and (letters := _length(data[at])) <= 4:
        name, at = data[at : at + letters], at + letters
        size = int.from_bytes(data[at : at + (digits := _length(data[at]) if at < end else 9)])
        begin = at + digits
        size &= ~(1 << 7 * digits)  # the bit that tells how many bytes there are
        if digits > 8 or size == (1 << 7 * digits) - 1:
            return
        at = begin + size
        yield name, begin, at


def _length(first: int) -> int:
    """Returns the number of bytes of a name or a size, as the leading zero bits of its first byte tell."""
    return 9 - first.bit_length()
