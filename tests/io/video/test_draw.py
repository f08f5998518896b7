"""Draws from anywhere in a clip: the frames in a row that decoding the whole clip gives, whatever the container."""

import os
import shutil

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

from flax_vae.io.video import draw, frame_index
from flax_vae.io.video.draw import draw_frames
from flax_vae.io.video_reader import read_clip
from tests.clips import encode, join, noise, remux, with_options
from tests.slow import some_slow

FRAMES = 48
SIZE = (32, 48)
CLOSED = with_options(20, bf=2, threads=1, preset="ultrafast")
OPEN = with_options(20, threads=1, preset="ultrafast", x264_params="open-gop=1:keyint=20:bframes=2:scenecut=0")
REFRESH = with_options(250, threads=1, preset="ultrafast", x264_params="intra-refresh=1:keyint=16:bframes=0")
PAUSES = [frame + 3 * (frame // 7) for frame in range(FRAMES)]  # 25ths of a second


def x264(name, prepare=CLOSED, **options):
    return lambda folder: encode(folder / name, clip(), prepare=prepare, **options)


def coded(name, codec, pix_fmt="yuv420p", gop=20, **options):
    return lambda folder: encode(folder / name, clip(), codec, pix_fmt, with_options(gop, **options))


def copied(name, shift=0, prepare=CLOSED, **options):
    return lambda folder: remux(encode(folder / "source.mp4", clip(), prepare=prepare), folder / name, shift, **options)


def late_start(folder):
    """A recording that begins in the middle of a group of pictures."""
    path = encode(folder / "whole.ts", clip(), prepare=CLOSED)
    data = path.read_bytes()
    (folder / "late.ts").write_bytes(data[188 * (len(data) // 188 // 5) :])
    return folder / "late.ts"


def clip():
    return noise(FRAMES, *SIZE)


MADE = {
    "mp4": x264("a.mp4"),
    "mp4 open": x264("a.mp4", OPEN),
    "mp4 with pauses": x264("a.mp4", times=PAUSES),
    "mp4 trimmed": copied("a.mp4", -13, avoid_negative_ts="disabled"),
    "mp4 trimmed open": copied("a.mp4", -27, OPEN, avoid_negative_ts="disabled"),
    "mp4 late clock": copied("a.mp4", 250, use_editlist="0"),
    "mp4 fragments": x264("a.mp4", movflags="frag_keyframe+empty_moov"),
    "mov": coded("a.mov", "mjpeg", "yuvj420p"),
    "mkv": x264("a.mkv"),
    "mkv open": x264("a.mkv", OPEN),
    "mkv with pauses": x264("a.mkv", times=PAUSES),
    "mkv late clock": copied("a.mkv", 250),
    "mkv without cues": x264("a.mkv", live="1"),
    "webm": coded("a.webm", "libvpx-vp9", lag_in_frames=8, auto_alt_ref=1, cpu_used=8, deadline="realtime"),
    "ts": x264("a.ts"),
    "ts open": x264("a.ts", OPEN),
    "ts refreshed": x264("a.ts", REFRESH),
    "ts of MPEG-2": coded("a.ts", "mpeg2video", bf=2),
    "ts late": late_start,
    "ts joined": lambda folder: join(folder / "b.ts", *[encode(folder / "a.ts", clip(), prepare=CLOSED)] * 2),
    "m2ts": x264("a.m2ts"),
    "mpg": coded("a.mpg", "mpeg2video", bf=2),
    "mpg joined": lambda folder: join(folder / "b.mpg", *[coded("a.mpg", "mpeg2video", bf=2)(folder)] * 2),
    "flv": x264("a.flv"),
    "avi of MPEG-4": coded("a.avi", "mpeg4", bf=2),
    "avi of H.264": x264("a.avi"),
    "wmv": coded("a.wmv", "wmv2"),
    "nut": x264("a.nut"),
    "H.264 alone": x264("a.h264"),
    "MPEG-4 alone": coded("b.m4v", "mpeg4", bf=2),
    "y4m": coded("a.y4m", "wrapped_avframe"),
    "gif": coded("a.gif", "gif", "rgb8"),
    "apng": coded("a.apng", "apng", "rgb24"),
}


USUAL = {"mp4", "mp4 open", "mp4 trimmed", "mp4 fragments", "mkv with pauses", "ts", "ts joined", "mpg", "flv", "gif"}


@pytest.mark.parametrize("kind", some_slow(MADE, MADE.keys() - USUAL))
def test_every_draw_is_frames_in_a_row_of_the_whole_clip(tmp_path, kind):
    path = MADE[kind](tmp_path)
    whole, count = read_clip(path), 5
    last = len(whole) - count
    assert last > 5
    for first in {*range(0, last, 5), last}:
        drawn = draw_frames(path, count, SIZE, (first + 0.5) / (last + 1))
        assert np.array_equal(drawn, whole[first : first + count]), first
    with pytest.raises(ValueError, match=f"has {len(whole)} frames, and {len(whole) + 1} are needed"):
        draw_frames(path, len(whole) + 1, SIZE)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "mpg", "avi of MPEG-4", "m2ts"])
def test_a_draw_decodes_no_more_than_from_the_key_frame_before_it(tmp_path, monkeypatch, kind):
    path, decoded = MADE[kind](tmp_path), []

    def counting(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    decode = draw.decode
    monkeypatch.setattr(draw, "decode", counting)
    draw_frames(path, 3, SIZE, 0.999)
    assert 3 <= len(decoded) <= FRAMES - 40 + 2  # the third group begins with frame 40, or that frame's leading ones


def test_an_mp4_at_a_constant_rate_is_not_read_through(tmp_path, monkeypatch):
    path = MADE["mp4"](tmp_path)
    whole = read_clip(path)
    monkeypatch.setattr(frame_index, "_demuxed", lambda path: pytest.fail("the packets are read"))
    assert np.array_equal(draw_frames(path, 5, SIZE, 0.999), whole[-5:])


def test_a_file_is_indexed_once_until_it_changes(tmp_path, monkeypatch):
    path, read = tmp_path / "a.ts", []
    demuxed = frame_index._demuxed
    monkeypatch.setattr(frame_index, "_demuxed", lambda path: read.append(path) or demuxed(path))
    encode(path, clip(), prepare=CLOSED)
    for _ in range(3):
        draw_frames(path, 5, SIZE, 0.5)
    assert len(read) == 1
    other = encode(tmp_path / "b.ts", clip()[::-1][:30], prepare=CLOSED)
    shutil.copyfile(other, path)
    os.utime(path, ns=(0, 0))
    assert np.array_equal(draw_frames(path, 5, SIZE, 0.999), read_clip(other)[-5:])
    assert len(read) == 2


@pytest.mark.parametrize("kind", ["mp4", "ts", "mkv with pauses"])
def test_frames_are_skipped_to_a_lower_rate(tmp_path, kind):
    path = MADE[kind](tmp_path)
    whole, pace = read_clip(path), 1 if kind == "mkv with pauses" else 2
    drawn = draw_frames(path, 4, SIZE, 0.999, fps=12.5 if pace == 2 else None)
    assert np.array_equal(drawn, whole[-1 - 3 * pace :: pace])


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_what_is_damaged_in_one_place_is_drawn_from_others(tmp_path, name):
    path = encode(tmp_path / name, clip(), prepare=CLOSED)
    whole, data = read_clip(path), bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = bytes(1500)
    path.write_bytes(data)
    assert np.array_equal(draw_frames(path, 5, SIZE), whole[:5])
    assert np.array_equal(draw_frames(path, 5, SIZE, 0.999), whole[-5:])
    with pytest.raises(ValueError, match="damaged or cut short after"):
        draw_frames(path, 5, SIZE, 0.75)


@pytest.mark.parametrize("lie", [frame_index.FrameIndex(3, range(3)), frame_index.FrameIndex(1, [0], {0: 0})])
def test_a_clip_is_too_short_only_when_its_frames_are_counted(tmp_path, monkeypatch, lie):
    path = MADE["mp4"](tmp_path)
    monkeypatch.setattr(frame_index, "_stated", lambda path: lie)
    monkeypatch.setattr(frame_index, "_demuxed", lambda path: lie)
    assert np.array_equal(draw_frames(path, 9, SIZE, 0.999), read_clip(path)[-9:])
    with pytest.raises(ValueError, match=f"has {FRAMES} frames, and 99 are needed"):
        draw_frames(path, 99, SIZE)


def test_an_index_that_decoding_contradicts_is_replaced(tmp_path, monkeypatch):
    path = MADE["mp4"](tmp_path)
    whole = read_clip(path)
    times = [time + (time > 9000) for time in range(0, 512 * FRAMES, 512)]
    lies = iter([frame_index.FrameIndex(FRAMES, times, {0: 0}), frame_index.FrameIndex(FRAMES + 9, range(FRAMES + 9))])
    monkeypatch.setattr(frame_index, "_stated", lambda path: next(lies))
    monkeypatch.setattr(frame_index, "_demuxed", lambda path: next(lies))
    for moment in (0.999, 0.0, 0.999):
        first = int(moment * (FRAMES - 4))
        assert np.array_equal(draw_frames(path, 5, SIZE, moment), whole[first : first + 5])
