"""Healthy files that look damaged are read whole; those that are damaged still say so."""

import struct
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

import av

from flax_vae.io.video.draw import draw_frames
from flax_vae.io.video.exif import is_cut_jpeg
from flax_vae.io.video_reader import probe, read_clip, read_frames
from flax_vae.io.video_writer import write_image
from tests.clips import encode, join, noise, with_options

VIDEO = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"mdat\x11\xff\xda\x22" * 40  # as phones put behind a photo
CODED = {
    "a.jpg": ("mjpeg", "yuvj420p"),
    "a.png": ("png", "rgb24"),
    "a.bmp": ("bmp", "bgr24"),
    "a.tiff": ("tiff", "rgb24"),
}


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("behind", [VIDEO, b"\xff\xda", b"\xff\xd8\xff\xda\x00\x02", b"\0"])
def test_a_still_is_whole_whatever_stands_behind_it(tmp_path, name, behind):
    path = encode(tmp_path / name, noise(1, 48, 64), *CODED[name], update="1")
    alone = read_clip(path)
    path.write_bytes(path.read_bytes() + behind)
    assert np.array_equal(read_clip(path), alone)
    assert probe(path).frames == 1


def test_a_jpeg_is_cut_wherever_its_end_is_missing(tmp_path):
    data = encode(tmp_path / "a.jpg", noise(1, 48, 64), "mjpeg", "yuvj420p", update="1").read_bytes()
    thumbnail = data[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + data[2:]
    for whole in (data, thumbnail):  # a thumbnail is a JPEG of its own inside
        assert not is_cut_jpeg(whole + VIDEO)
        assert all(is_cut_jpeg(whole[:length]) for length in range(2, len(whole) - 1, 37))
        assert is_cut_jpeg(whole[:-2])


@pytest.mark.parametrize("codec", ["mpeg4", "libvpx"])
def test_an_empty_packet_repeats_the_last_frame(tmp_path, codec):
    clip, path = noise(4, 32, 48), tmp_path / "a.nut"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=50)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.max_b_frames = 0
        if codec == "libvpx":
            stream.options = {"lag-in-frames": "0", "deadline": "realtime"}
        for index, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 2 * index
            (packet,) = stream.encode(frame)
            container.mux(packet)
            empty = av.Packet()
            empty.stream, empty.time_base, empty.pts, empty.dts = stream, Fraction(1, 50), 2 * index + 1, 2 * index + 1
            container.mux(empty)
    read = read_clip(path)
    assert len(read) == 8
    assert np.array_equal(read[::2], read[1::2])
    assert len(np.unique(read[::2], axis=0)) == 4
    assert np.array_equal(draw_frames(path, 3, (32, 48), 0.999), read[-3:])


CODECS = {
    "libx264": with_options(8, bf=2, threads=1, preset="ultrafast"),
    "mpeg2video": with_options(8, bf=2),
}


@pytest.mark.parametrize("name", ["a.ts", "a.m2ts"])
@pytest.mark.parametrize("codec", CODECS)
def test_joined_recordings_are_read_to_their_end(tmp_path, codec, name):
    joined = 0
    for frames in range(9, 15):  # whether the counters jump follows from the number of packets
        path = encode(tmp_path / name, noise(frames, 32, 48), codec, prepare=CODECS[codec])
        alone, both = read_clip(path), join(tmp_path / f"both_{name}", path, path)
        try:
            read = read_clip(both)
        except ValueError:  # one frame in 184 ends with its packet, and then looks like one that was cut
            continue
        joined += 1
        assert np.array_equal(read, np.concatenate([alone, alone]))
    assert joined >= 5


@pytest.mark.parametrize("codec", CODECS)
def test_packets_that_are_lost_before_a_key_frame_are_noticed(tmp_path, codec):
    path = encode(tmp_path / "a.ts", noise(17, 32, 48), codec, prepare=CODECS[codec])
    whole, data = read_clip(path), path.read_bytes()
    with av.open(str(path)) as container:
        key = [packet.pos or 0 for packet in container.demux(video=0) if packet.is_keyframe and packet.size][1]
    tracks = {at: int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF for at in range(0, key + 188, 188)}
    for lost in [at for at in tracks if at < key and tracks[at] == tracks[key]][-4:]:
        path.write_bytes(data[:lost] + data[lost + 188 :])
        seen = []
        with pytest.raises(ValueError, match="damaged or cut short"):
            seen.extend(read_frames(path))
        assert np.array_equal(np.stack(seen[:-1]), whole[: len(seen) - 1])


@pytest.mark.parametrize(
    "name", ["f%d.png", "f%03d.png", "f*.png", "f?.png", "f[0].png", "{f}.png", "50%.png", "%d.jpg", "%d.gif"]
)
def test_a_name_is_not_a_pattern(tmp_path, name):
    folder = tmp_path / "take %d [1]"
    folder.mkdir()
    for other in ("f0.png", "f1.png", "f000.png", "f.png", "0.jpg", "1.jpg", "0.gif"):
        (folder / other).write_bytes(b"another file")
    codec = {"jpg": ("mjpeg", "yuvj420p"), "gif": ("gif", "rgb8")}.get(name[-3:], ("png", "rgb24"))
    plain = encode(
        tmp_path / f"plain.{name[-3:]}", noise(1, 32, 48), *codec, **{} if "gif" in codec else {"update": "1"}
    )
    (folder / name).write_bytes(plain.read_bytes())
    assert np.array_equal(read_clip(folder / name), read_clip(plain))
    assert probe(folder / name) == probe(plain)


@pytest.mark.parametrize("name", ["f%d.png", "f%03d.png", "[f]*.png"])
def test_an_image_is_written_under_its_own_name(tmp_path, name):
    folder = tmp_path / "take %d"
    folder.mkdir()
    (frame,) = noise(1, 33, 47)
    write_image(folder / name, frame)
    assert [path.name for path in folder.iterdir()] == [name]
    assert np.array_equal(read_clip(folder / name)[0], frame)
