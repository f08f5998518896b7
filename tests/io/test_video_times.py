"""When the frames of a clip are shown: what is read of any container, and what is written from pieces."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from flax_vae.io.video_reader import probe, read_clip, read_frames, read_timed
from flax_vae.io.video_writer import VideoWriter

av = pytest.importorskip("av", reason="video needs PyAV: pip install av")
join = pytest.importorskip("flax_vae.io.video_join", reason="video needs PyAV: pip install av").join

SIZE = (32, 48)
MILLISECOND = Fraction(1, 1000)
PHONE = [Fraction(0), *(Fraction(3000 * i + (i * 337) % 60 - 30, 90000) for i in range(1, 40)), Fraction(40, 30)]
SCREEN = [Fraction(i, 1000) for i in (0, 16, 33, 2500, 2517, 2533, 6001, 6018, 9500, 9533)]
SLIDES = [Fraction(i) for i in (0, 7, 8, 30, 31, 95)]
LAST = [*(Fraction(i, 30) for i in range(20)), Fraction(20, 30) + 5]
SLOWER = [Fraction(i * 2, 25) for i in range(20)]  # than the rate that the file states
KINDS = {"phone": PHONE, "slower": SLOWER, "screen": SCREEN, "slides": SLIDES, "long last frame": LAST}


def smooth(frames):
    """Frames that move evenly, which are compressed in another order than they are shown."""
    wave = (np.linspace(0, 255, SIZE[1])[None, None, :, None] + 4 * np.arange(frames)[:, None, None, None]) % 256
    return np.broadcast_to(wave, (frames, *SIZE, 3)).astype(np.uint8)


def write_timed(path, times, codec="libx264", offset=0, **options):
    """Writes frames at these times and the end of the last, with PyAV alone; `offset` is that of the file's clock."""
    clock = 100 if codec == "gif" else 30 if path.suffix == ".h264" else 90000
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=100 if codec == "gif" else 30)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, clock)
        stream.options = {"bf": "0"}
        packets, durations = [], {}
        for pixels, (begin, end) in zip(smooth(len(times) - 1), pairwise(times), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            frame.time_base, frame.pts = Fraction(1, clock), round((begin + offset) * clock)
            durations[frame.pts] = round((end - begin) * clock)
            packets += stream.encode(frame)
        for packet in packets + stream.encode():
            packet.duration = durations[packet.pts]
            container.mux(packet)
    return path


def recounted(data):
    """Numbers the packets of a transport stream anew, of each track by itself."""
    data, counts = bytearray(data), {}
    for place in range(0, len(data), 188):
        track = int.from_bytes(data[place + 1 : place + 3], "big") & 0x1FFF
        counts[track] = counts.get(track, -1) + (data[place + 3] >> 4 & 1)  # those without contents do not count
        data[place + 3] = data[place + 3] & 0xF0 | counts[track] & 0x0F
    return bytes(data)


def read_times(path, frames=None, start=0):
    spans = [(begin, end) for begin, end, _ in read_timed(path, None, frames, start)]
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    return [begin for begin, _ in spans] + [spans[-1][1]]


def assert_close(times, expected, allowed=MILLISECOND):
    assert len(times) == len(expected)
    assert max(abs(a - b) for a, b in zip(times, expected, strict=True)) <= allowed


def joined(path, times, lengths, sound=None):
    """Writes frames with these times as pieces, and joins them."""
    pieces, start, clip = [], 0, smooth(len(times) - 1)
    for number, length in enumerate(lengths):
        pieces.append(path.with_name(f"piece{number}.mp4"))
        with VideoWriter(pieces[-1], 30, *SIZE) as writer:
            writer.write(clip[start : start + length])
        start += length
    join(path, pieces, Fraction(30), sound, times)
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx"),
        ("a.ts", "libx264"),
        ("a.flv", "flv"),
        ("a.wmv", "wmv2"),
    ],
)
@pytest.mark.parametrize("kind", ["phone", "screen", "slower"])
@pytest.mark.parametrize("offset", [0, 10])
def test_times_are_read_from_the_first_frame_on(tmp_path, name, codec, kind, offset):
    times = KINDS[kind]
    path = write_timed(tmp_path / name, times, codec, offset)
    found = read_times(path)
    assert_close(found[:-1], times[:-1])
    assert found[-1] > found[-2]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_frame_ends_where_the_file_says(tmp_path, name, kind):
    assert_close(read_times(write_timed(tmp_path / name, KINDS[kind])), KINDS[kind])


def test_delays_of_a_gif_are_read(tmp_path):
    times = [Fraction(i, 100) for i in (0, 10, 15, 200, 210, 500)]
    assert read_times(write_timed(tmp_path / "a.gif", times, "gif")) == times


def test_a_part_ends_where_the_next_frame_begins_and_goes_on_in_time(tmp_path):
    path, whole = write_timed(tmp_path / "a.mp4", SCREEN), read_clip(tmp_path / "a.mp4")
    for frames in range(1, len(SCREEN)):
        assert read_times(path, frames) == SCREEN[: frames + 1]
    assert read_times(path, 3, start=4) == SCREEN[4:8]
    parts = [pixels for *_, pixels in read_timed(path, None, 3, start=4)]
    assert np.array_equal(np.stack(parts), whole[4:7])
    assert not list(read_timed(path, start=9))


def test_what_has_no_times_is_at_its_rate(tmp_path):
    path = write_timed(tmp_path / "a.h264", [Fraction(i, 30) for i in range(20)])
    with av.open(str(path)) as container:
        assert {frame.pts for frame in container.decode(video=0)} == {None}
    assert_close(read_times(path), [Fraction(i, 30) for i in range(20)])


def test_a_clock_that_leaps_by_days_goes_on(tmp_path):
    leap = [*SCREEN[:4], *(time + 10**6 for time in SCREEN[4:])]
    found = read_times(write_timed(tmp_path / "a.mkv", leap))
    assert_close(found[5:8], [time + found[4] - SCREEN[4] for time in SCREEN[5:8]])
    assert_close(found[:4], SCREEN[:4])
    assert found[4] - found[3] == pytest.approx(1 / 30, abs=0.001)


def test_a_clock_that_starts_anew_goes_on(tmp_path):
    path = write_timed(tmp_path / "a.ts", SCREEN)
    path.write_bytes(recounted(path.read_bytes() * 2))
    found = []
    for begin, *_ in read_timed(path):
        found.append(begin)
    assert len(found) > 10
    assert all(after > before for before, after in pairwise(found))
    assert found[-1] < 2 * SCREEN[-1] + 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("codec", ["mp2", "aac"])
def test_sound_goes_on_with_the_pictures_where_the_clock_starts_anew(tmp_path, suffix, codec):
    times, path = [Fraction(i, 25) for i in range(51)], tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg2video", rate=25), container.add_stream(codec, rate=48000)
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        for number, pixels in enumerate(smooth(25)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 3840), np.int16), "s16", "stereo")
            frame.sample_rate, frame.pts = 48000, 1920 * number
            container.mux(sound.encode(frame))
        container.mux([*video.encode(), *sound.encode()])
    path.write_bytes(recounted(path.read_bytes() * 2))
    with av.open(str(joined(tmp_path / f"out{suffix}", times, (50,), path))) as container:
        heard = [(frame.time, frame.samples) for frame in container.decode(audio=0)]
    assert all(after[0] > before[0] for before, after in pairwise(heard))
    assert abs(heard[-1][0] - 2) < 0.1
    assert abs(sum(samples for _, samples in heard) / 48000 - 2) < 0.15


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_damaged_clip_is_read_with_times_as_far_as_without(tmp_path, name):
    path = write_timed(tmp_path / name, PHONE, movflags="faststart")
    with av.open(str(path)) as container:
        position = [packet.pos for packet in container.demux(video=0) if packet.size][20]
    frames, timed = [], []
    path.write_bytes(path.read_bytes()[: position + 20])
    with pytest.raises(ValueError, match="damaged or cut short") as plain:
        frames.extend(read_frames(path))
    with pytest.raises(ValueError, match="damaged or cut short") as caught:
        timed.extend(read_timed(path))
    assert str(caught.value) == str(plain.value)
    assert len(timed) == len(frames) == 20
    assert all(np.array_equal(a, b[2]) for a, b in zip(frames, timed, strict=True))
    assert_close([begin for begin, *_ in timed], PHONE[: len(timed)])
    assert len(list(read_timed(path, frames=len(timed)))) == len(timed)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("phone", (17, 16, 7)), ("phone", (40,)), ("screen", (9,)), ("screen", (8, 1)), ("slides", (5,)),
     ("slides", (1, 4)), ("long last frame", (9, 8, 3)), ("long last frame", (20,))],
)  # fmt: skip
def test_frames_are_written_at_their_times_in_an_order_that_players_take(tmp_path, suffix, kind, lengths):
    times = KINDS[kind]
    path = joined(tmp_path / f"out{suffix}", times, lengths)
    assert_close(read_times(path), times, MILLISECOND if suffix == ".mkv" else Fraction(0))
    assert len(read_clip(path)) == len(times) - 1
    assert abs(float(probe(path).fps) - (len(times) - 1) / float(times[-1])) < 0.1 * float(probe(path).fps)
    with av.open(str(path)) as container:
        order = [(packet.pts, packet.dts) for packet in container.demux(video=0) if packet.size]
        assert abs(container.duration / 1e6 - float(times[-1])) < 0.002
    if suffix != ".mkv":  # which states no times of decoding
        assert all(after[1] > before[1] for before, after in pairwise(order))
        assert all(shown >= decoded for shown, decoded in order)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_frames_closer_than_the_clock_are_all_written(tmp_path, suffix):
    times = [Fraction(0), Fraction(1, 7_000_000), Fraction(2, 7_000_000), Fraction(1, 3), Fraction(1, 2)]
    path = joined(tmp_path / f"out{suffix}", times, (4,))
    assert len(read_clip(path)) == 4
    assert_close(read_times(path), times, 2 * MILLISECOND)


def test_another_number_of_times_is_refused(tmp_path):
    joined(tmp_path / "out.mp4", SCREEN, (9,))
    before = (tmp_path / "out.mp4").read_bytes()
    with pytest.raises(ValueError, match="got 9 times for 9 frames, expected one more"):
        join(tmp_path / "out.mp4", [tmp_path / "piece0.mp4"], Fraction(30), None, SCREEN[:-1])
    assert (tmp_path / "out.mp4").read_bytes() == before
