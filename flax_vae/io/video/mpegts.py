"""Tells MPEG-TS files that were joined, as segments and recordings are, from one that has lost some of its packets."""

from flax_vae.io.files import PathLike

PACKET_SIZES = (188, 192, 204)  # bytes: as broadcast; with a time in front, in .m2ts; with a checksum behind
SEARCHED = 2**20  # bytes before a key frame in which the end of the frame before it is looked for


def is_joined_at(path: PathLike, position: int | None) -> bool:
    """Whether the frame before the one whose packets begin at this byte is whole, though the counter jumps there.

    A frame ends in a packet that is filled up, which is not there where the end of a frame is lost.
    """
    begin = max((position or 0) - SEARCHED, 0)
    with open(path, "rb") as file:
        file.seek(begin)
        data = file.read((position or 0) - begin + 2 * max(PACKET_SIZES))
    at = data.find(b"\x47", (position or 0) - begin)  # a packet begins with this, in .m2ts after 4 bytes
    size = next((size for size in PACKET_SIZES if data[at + size : at + size + 1] == b"\x47"), 0)
    if at < 0 or not size:
        return False
    track, _, counter = _header(data, at)
    for before in range(at - size, -1, -size):
        other, is_filled, last = _header(data, before)
        if other == track:
            return is_filled and counter != (last + 1) % 16
    return False


def _header(data: bytes, at: int) -> tuple[int, bool, int]:
    """Returns the number of a packet's track, whether it has more than content, and its counter."""
    return int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF, bool(data[at + 3] & 0x20), data[at + 3] & 15
