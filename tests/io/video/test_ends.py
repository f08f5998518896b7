"""Where clips end: a file that lacks frames says so, one that only seems to end early is read whole."""

import itertools
import re
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

import av

from flax_vae.io.video import matroska
from flax_vae.io.video.timed import timed
from flax_vae.io.video_reader import read_clip
from tests.clips import encode, noise, remux, with_options

CODECS = {"a.mkv": ("libx264", with_options(8, bf=2)), "a.webm": ("libvpx", with_options(8))}


def still_at_last(path, seconds):
    """Writes 9 frames of 1/25 s, of which the last stays: as a recording of a screen does."""
    clip = encode(path.with_suffix(".mp4"), noise(9, 32, 48), prepare=with_options(9, bf=0))
    with av.open(str(clip)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [packet for packet in given.demux(video=0) if packet.pts is not None]
        packets[-1].duration = int(seconds / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("is_told", [True, False])
def test_matroska_that_is_cut_says_so_wherever_its_length_stands(tmp_path, name, is_told):
    codec, prepare = CODECS[name]
    path = encode(tmp_path / name, noise(40, 48, 64), codec, prepare=prepare)
    data = path.read_bytes()
    if not is_told:  # mkvmerge writes the length of each track behind the frames
        data = data.replace(b"DURATION", b"A NUMBER")
    path.write_bytes(data)
    whole = read_clip(path)
    assert len(whole) == 40
    assert matroska.is_whole(path)
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        assert matroska.is_cut(path)
        assert not matroska.is_whole(path)
        with pytest.raises(ValueError, match=r"1\.\d\d s long by its header, but ends at|a packet is incomplete"):
            read_clip(path)


@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
@pytest.mark.parametrize("is_copied", [True, False])
def test_the_last_frame_may_stay_for_long(tmp_path, name, is_copied):
    path = still_at_last(tmp_path / name, 7)
    if is_copied:  # in Matroska the last frame has the usual length then; only that of the clip tells
        path = remux(path, tmp_path / f"copy_{name}")
    assert len(read_clip(path)) == 9
    *_, (begin, end, _) = timed(path, None)
    assert abs(begin - Fraction(8, 25)) < Fraction(1, 500)
    assert abs(end - begin - 7) < Fraction(1, 100)


def test_a_tail_of_zeros_is_no_long_last_frame(tmp_path):
    path = encode(tmp_path / "a.mkv", noise(40, 48, 64), prepare=with_options(8, bf=0))
    data, whole = path.read_bytes(), read_clip(path)
    for share in (0.5, 0.8):  # as of a download into a file that has its size from the start
        at = int(share * len(data))
        path.write_bytes(data[:at] + bytes(len(data) - at))
        with pytest.raises(ValueError, match="damaged or cut short after") as caught:
            read_clip(path)
        count = int(re.findall(r"after (\d+) frames", str(caught.value))[0])
        assert np.array_equal(read_clip(path, frames=count), whole[:count])


def test_any_bytes_are_whole_or_not(tmp_path):
    path, rng = tmp_path / "a.mkv", np.random.default_rng(0)
    for data in (b"\0", b"\x1a", matroska.SEGMENT, matroska.SEGMENT + b"\x08"):
        path.write_bytes(data)
        assert not matroska.is_whole(path)
    for length in range(1, 300):
        path.write_bytes(matroska.SEGMENT + rng.bytes(length))
        assert {matroska.is_whole(path), matroska.is_cut(path)} <= {True, False}
    # the most that may lie in each other is a cluster in the segment: a thousand are looked into no further
    path.write_bytes(b"".join(matroska.CLUSTER + (2**56 + 12 * (999 - i)).to_bytes(8) for i in range(1000)))
    assert matroska.is_whole(path)
    path.write_bytes(matroska.SEGMENT + b"\x01" + b"\xff" * 7 + b"\xec\x80")  # a live recording, of unknown size
    assert not matroska.is_cut(path)


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov+default_base_moof", "dash+delay_moov+skip_sidx"])
def test_a_segment_of_a_broadcast_is_a_whole_clip(tmp_path, flags):
    path = encode(tmp_path / "a.mp4", noise(40, 48, 64), prepare=with_options(8, bf=2, sc_threshold=0), movflags=flags)
    whole, data = read_clip(path), path.read_bytes()
    begins = [found.start() - 4 for found in re.finditer(b"moof", data)]
    read = []
    for begin, end in itertools.pairwise([*begins, len(data)]):
        (segment := tmp_path / "segment.mp4").write_bytes(data[: begins[0]] + data[begin:end])
        read.append(read_clip(segment))  # its clock goes on from those before
    assert len(read) >= 5
    assert np.array_equal(np.concatenate(read), whole)
