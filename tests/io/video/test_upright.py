"""Pictures that are stored turned or mirrored: they stand as EXIF and display matrices say, whatever the format."""

import struct
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

import av

from flax_vae.io.video.draw import draw_frames
from flax_vae.io.video_reader import probe, read_clip
from tests.clips import encode, noise

# What EXIF's numbers say is to be done with the stored picture.
SHOWN = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
MATRIX = {  # of MP4 files, (a, b, c, d) of the pixel's new place (a x + c y, b x + d y)
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
SMOOTH = np.stack(np.broadcast_arrays(4 * np.arange(24)[:, None], 2 * np.arange(40), 90), -1).astype(np.uint8)[None]


def tiff(orientation, order="<"):
    """A block of EXIF: the order of bytes, and a directory with two entries."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    entries = (0x010F, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack(order + "HH", orientation, 0))
    directory = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + struct.pack(order + "H", len(entries)) + directory + bytes(4)


def png(path, block):
    data = encode(path, SMOOTH, "png", "rgb24").read_bytes()
    path.write_bytes(data[:33] + struct.pack(">I", len(block)) + b"eXIf" + block + bytes(4) + data[33:])


def jpg(path, block):
    data = encode(path, SMOOTH, "mjpeg", "yuvj444p", update="1").read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:])


def webp(path, block):
    codec = av.CodecContext.create("libwebp", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *SMOOTH.shape[1:3], "bgra", Fraction(1, 25)
    codec.options = {"lossless": "1"}
    frame = av.VideoFrame.from_ndarray(SMOOTH[0], format="rgb24").reformat(format="bgra")
    still = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])[12:]
    sizes = struct.pack("<I", SMOOTH.shape[2] - 1)[:3] + struct.pack("<I", SMOOTH.shape[1] - 1)[:3]
    chunks = b"VP8X" + struct.pack("<II", 10, 8) + sizes + still
    chunks += b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks)


def tif(path, block):
    """Moves the directory of a TIFF behind its end, with one entry more."""
    data = encode(path, SMOOTH, "tiff", "rgb24").read_bytes()
    (at,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[at : at + 2])
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    entries = sorted([*entries, block[10 + 12 : 10 + 24]], key=lambda entry: struct.unpack("<H", entry[:2]))
    directory = struct.pack("<H", count + 1) + b"".join(entries) + bytes(4)
    path.write_bytes(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)


STILLS = {".png": png, ".jpg": jpg, ".webp": webp, ".tiff": tif}


@pytest.mark.parametrize("suffix", STILLS)
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_turns_and_mirrors_a_still(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    STILLS[suffix](path, tiff(orientation))
    shown = SHOWN[orientation](SMOOTH[0]).astype(int)
    info, read = probe(path), read_clip(path)[0]
    assert (info.height, info.width) == read.shape[:2] == shown.shape[:2]
    assert np.abs(read - shown).max() <= (0 if suffix != ".jpg" else 12)
    assert np.array_equal(draw_frames(path, 1, shown.shape[:2])[0], read)


@pytest.mark.parametrize("orientation", [2, 5, 6])
def test_exif_may_be_big_endian(tmp_path, orientation):
    png(tmp_path / "a.png", tiff(orientation, ">"))
    assert np.array_equal(read_clip(tmp_path / "a.png")[0], SHOWN[orientation](SMOOTH[0]))


def test_an_animated_png_is_turned_too(tmp_path):
    clip = noise(3, 24, 40)
    data = encode(tmp_path / "a.apng", clip, "apng", "rgb24").read_bytes()
    block = tiff(5)
    path = tmp_path / "b.png"
    path.write_bytes(data[:33] + struct.pack(">I", len(block)) + b"eXIf" + block + bytes(4) + data[33:])
    assert np.array_equal(read_clip(path), clip.swapaxes(1, 2))


@pytest.mark.parametrize(
    "block",
    [
        *(tiff(6)[:length] for length in range(0, len(tiff(6)) - 8, 5)),
        tiff(0),
        tiff(9),
        tiff(6).replace(struct.pack("<I", 8), b"\xff" * 4),
        b"\xff" * 50,
    ],
)
def test_exif_that_is_broken_leaves_the_picture_as_it_is_stored(tmp_path, block):
    jpg(tmp_path / "a.jpg", block)
    assert read_clip(tmp_path / "a.jpg").shape == SMOOTH.shape


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "fragments.mp4"])
@pytest.mark.parametrize("orientation", MATRIX)
def test_a_display_matrix_turns_and_mirrors_a_clip(tmp_path, name, orientation):
    options = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in name else {}
    clip, path = noise(3, 24, 40), tmp_path / name
    encode(path, clip, "libx264rgb", "rgb24", lambda stream: setattr(stream, "options", {"qp": "0"}), **options)
    data, (a, b, c, d) = bytearray(path.read_bytes()), MATRIX[orientation]
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    shown = np.stack([SHOWN[orientation](frame) for frame in clip])
    assert np.array_equal(read_clip(path), shown)
    assert (probe(path).height, probe(path).width) == shown.shape[1:3]
    assert np.array_equal(draw_frames(path, 2, shown.shape[1:3], 0.999), shown[1:])


def test_a_matrix_of_zeros_turns_nothing(tmp_path):
    clip, path = noise(2, 24, 40), tmp_path / "a.mp4"
    encode(path, clip, "libx264rgb", "rgb24", lambda stream: setattr(stream, "options", {"qp": "0"}))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = bytes(36)
    path.write_bytes(data)
    assert np.array_equal(read_clip(path), clip)
