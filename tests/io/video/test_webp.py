"""Animated WebP: its pictures are laid over each other as the file says."""

import struct
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

import av

from flax_vae.io.video.draw import draw_frames
from flax_vae.io.video_reader import probe, read_clip, read_frames
from tests.clips import encode, noise, with_options

SIZE = (32, 48)


def three(number):
    return number.to_bytes(3, "little")


def picture(pixels, **options):
    """Encodes RGBA (H, W, 4) without loss; returns the chunks of a still."""
    codec = av.CodecContext.create("libwebp", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *pixels.shape[:2], "bgra", Fraction(1, 25)
    codec.options = {"lossless": "1"} | options
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgba").reformat(format="bgra")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])[12:]


def animation(path, *pictures):
    """Writes pictures (pixels, (top, left), flags), 40 ms each."""
    chunks = b"VP8X" + struct.pack("<II", 10, 18) + three(SIZE[1] - 1) + three(SIZE[0] - 1)
    chunks += b"ANIM" + struct.pack("<IIH", 6, 0xFFFFFFFF, 0)
    for pixels, (top, left), flags in pictures:
        place = three(left // 2) + three(top // 2) + three(pixels.shape[1] - 1) + three(pixels.shape[0] - 1)
        content = place + three(40) + bytes([flags]) + picture(pixels)
        chunks += b"ANMF" + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks)
    return path


def opaque(height, width, seed=0):
    pixels = noise(1, height, width, seed)[0]
    return np.concatenate([pixels, np.full((height, width, 1), 255, np.uint8)], axis=-1)


def test_an_animated_webp_is_a_clip(tmp_path):
    clip = noise(1, *SIZE).repeat(9, 0)
    for number in range(9):
        clip[number, number : number + 9, 3 * number : 3 * number + 9] = 25 * number
    path = encode(tmp_path / "a.webp", clip, "libwebp_anim", "bgra", with_options(5, lossless=1))
    assert np.array_equal(read_clip(path), clip)
    info = probe(path)
    assert (info.height, info.width, info.frames, info.fps, info.is_image) == (*SIZE, 9, 25, False)
    assert np.array_equal(np.stack(list(read_frames(path, start=3, frames=4))), clip[3:7])
    for first in range(6):
        assert np.array_equal(draw_frames(path, 4, SIZE, (first + 0.5) / 6), clip[first : first + 4])
    assert np.array_equal(draw_frames(path, 3, SIZE, 0.0, fps=12.5), clip[:5:2])


def test_pictures_are_placed_blended_and_taken_away(tmp_path):
    ground, patch, half = opaque(*SIZE), opaque(8, 12, 1), opaque(8, 12, 2)
    half[..., 3] = 128
    blend, replace, dispose = 0, 2, 1
    path = animation(
        tmp_path / "a.webp",
        (ground, (0, 0), replace),
        (patch, (4, 6), blend),
        (half, (20, 30), blend),
        (patch, (10, 10), replace | dispose),
        (half, (0, 0), replace),
    )
    first, placed, mixed, taken, last = read_clip(path).astype(int)
    assert np.array_equal(first, ground[..., :3])
    expected = ground[..., :3].astype(int)
    expected[4:12, 6:18] = patch[..., :3]
    assert np.array_equal(placed, expected)
    expected[20:28, 30:42] = np.rint((half[..., :3] * 128.0 + expected[20:28, 30:42] * 127.0) / 255)
    assert np.array_equal(mixed, expected)
    expected[10:18, 10:22] = patch[..., :3]
    assert np.array_equal(taken, expected)
    expected[10:18, 10:22] = 0
    expected[:8, :12] = half[..., :3]
    assert np.array_equal(last, expected)


def test_a_lossy_picture_with_alpha_is_read(tmp_path):
    smooth = np.full((*SIZE, 4), (200, 100, 50, 255), np.uint8)
    smooth[:, 24:, 3] = 90
    clip = np.stack([smooth, smooth])
    codec_options = {"lossless": "0", "quality": "95"}
    path = animation(tmp_path / "a.webp")
    content = three(0) * 2 + three(SIZE[1] - 1) + three(SIZE[0] - 1) + three(40) + b"\2"
    content += picture(smooth, **codec_options)[18:]  # without the header of a still with alpha
    data = path.read_bytes() + b"ANMF" + struct.pack("<I", len(content)) + content
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert b"ALPH" in data
    assert np.abs(read_clip(path)[0].astype(int) - clip[0, ..., :3]).max() <= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-9], "after 1 frames .it ends within a picture"),
        (lambda data: data.replace(three(5) + three(6), three(5) + three(60)), "outside of the canvas"),
        (lambda data: data[:24] + b"\xff" * 6 + data[30:], "16777216x16777216: expected at most"),
        (lambda data: data[:44], "no frame decodes"),
        (lambda data: data.replace(b"VP8L", b"VP8Q"), "after 0 frames"),
    ],
)
def test_a_damaged_animation_is_refused(tmp_path, change, message):
    path = animation(tmp_path / "a.webp", (opaque(*SIZE), (0, 0), 0), (opaque(8, 12), (12, 10), 0))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        read_clip(path)
    assert "a.webp" in str(caught.value)
