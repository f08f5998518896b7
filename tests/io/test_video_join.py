"""Pieces of video put together, and sound beside them: T frames, H W pixels."""

from fractions import Fraction

import numpy as np
import pytest

from flax_vae.io.video_reader import probe, read_clip
from flax_vae.io.video_writer import VideoWriter

av = pytest.importorskip("av", reason="video needs PyAV: pip install av")
join = pytest.importorskip("flax_vae.io.video_join", reason="video needs PyAV: pip install av").join

NTSC = Fraction(30000, 1001)
FPS, RATE, SIZE = Fraction(25), 48000, (32, 48)
FORMATS = {  # of sound: sample format, and how many samples a packet has
    "aac": ("fltp", 1024),
    "libmp3lame": ("fltp", 1152),
    "libopus": ("flt", 960),
    "mp2": ("s16", 1152),
    "flac": ("s16", 4608),
    "ac3": ("fltp", 1536),
    "pcm_s16le": ("s16", 1024),
}


def noise(frames, seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def write_pieces(folder, clip, lengths, fps=NTSC, lossless=False):
    """Writes a clip (T, H, W, 3) as pieces of these lengths."""
    assert sum(lengths) == len(clip)
    paths, start = [], 0
    for number, length in enumerate(lengths):
        paths.append(folder / f"piece{number}.mp4")
        with VideoWriter(paths[-1], fps, *clip.shape[1:3], lossless=lossless) as writer:
            writer.write(clip[start : start + length])
        start += length
    return paths


def timed_clip(frames=60, flash=33):
    """A grey clip with one white frame."""
    clip = np.full((frames, *SIZE, 3), 60, np.uint8)
    clip[flash] = 255
    return clip


def write_source(path, codec, frames=60, flash=33, fps=25, delay=0.0, tracks=1, silent=False):
    """Writes a clip with a click in its sound at the white frame; pictures start `delay` seconds after the sound."""
    sample_format, _ = FORMATS[codec]
    with av.open(str(path), "w") as container:
        pictures = "mpeg4" if path.suffix == ".avi" else "libx264"  # .avi has no times at which frames are shown
        video = container.add_stream(pictures, rate=fps, options={"bf": "0" if pictures == "mpeg4" else "2"})
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        sounds = [container.add_stream(codec, rate=RATE, layout="stereo", format=sample_format) for _ in range(tracks)]
        packets = []
        for number, pixels in enumerate(timed_clip(frames, flash)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000 * fps)
            frame.pts = number * 1000 + round(delay * 1000 * fps)
            packets += video.encode(frame)
        packets += video.encode()
        wave = np.zeros((2, round((frames / fps + delay) * RATE)), np.float32)
        wave[:] = 0.02 * np.sin(np.arange(wave.shape[1]) * 0.05)
        if not silent:
            wave[:, round((flash / fps + delay) * RATE) :][:, :40] = 0.9
        for sound in sounds:
            for start in range(0, wave.shape[1], 960):
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 960]), "fltp", "stereo")
                frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
                packets += sound.encode(frame)
            packets += sound.encode()
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            container.mux(packet)
    return path


def hear(path, track=0):
    """Returns the second of the click, how many seconds of sound there are, and where the sound starts."""
    click = loudest = count = 0
    start = None
    with av.open(str(path)) as container:
        stream = container.streams.audio[track]
        for frame in container.decode(stream):
            samples = frame.to_ndarray().astype(np.float64)
            samples = samples.reshape(-1, 2).T if samples.shape[0] == 1 else samples
            samples = np.abs(samples[0] / (32768 if "16" in frame.format.name else 1))
            start = frame.time if start is None else start
            if samples.max() > loudest:
                loudest = samples.max()
                click = frame.time + np.argmax(samples > 0.5 * loudest) / frame.sample_rate
            count += len(samples) / frame.sample_rate
    return click, count, start


def see(path):
    """Returns the second at which the white frame is shown, and that of the first frame."""
    with av.open(str(path)) as container:
        times = [(frame.to_ndarray(format="gray").mean(), frame.time) for frame in container.decode(video=0)]
    return max(times)[1], times[0][1]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("lengths", [(9, 8, 8, 8, 1), (17, 16, 2), (9, 8, 3), (1,), (2,), (129, 128, 7)])
def test_frames_of_pieces_are_all_there_in_order_to_the_last_bit(tmp_path, suffix, lengths):
    clip = noise(sum(lengths))
    pieces = write_pieces(tmp_path, clip, lengths, lossless=True)
    join(tmp_path / f"out{suffix}", pieces, NTSC)
    assert np.array_equal(read_clip(tmp_path / f"out{suffix}"), clip)
    assert probe(tmp_path / f"out{suffix}").frames in (len(clip), None)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("fps", [NTSC, 25, Fraction(24000, 1001), 60, Fraction(25, 2), 1, Fraction(999, 99991)])
def test_every_frame_has_its_time_and_the_rate_is_kept(tmp_path, suffix, fps):
    clip, fps = timed_clip(28, 5), Fraction(fps)
    join(tmp_path / f"out{suffix}", write_pieces(tmp_path, clip, (9, 8, 8, 3), fps), fps)
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    tick = Fraction(1, 1000) if suffix == ".mkv" else Fraction(1, 10000)
    assert len(times) == 28
    fps = fps.limit_denominator(1001)
    assert probe(tmp_path / f"out{suffix}").fps == fps
    assert all(abs(time - times[0] - i / fps) <= tick for i, time in enumerate(times))


def test_pieces_of_b_frames_are_decoded_in_an_order_that_players_take(tmp_path):
    smooth = (np.linspace(0, 255, 48)[None, None, :, None] + 4 * np.arange(41)[:, None, None, None]) % 256
    clip = np.broadcast_to(smooth, (41, *SIZE, 3)).astype(np.uint8)
    join(tmp_path / "out.mp4", write_pieces(tmp_path, clip, (9, 8, 8, 8, 8)), NTSC)
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    steps = [packet.dts for packet in packets]
    assert len(set(np.diff(steps))) == 1  # one frame after the other, without a gap or a step back
    assert all(packet.pts >= packet.dts for packet in packets)
    assert [packet.pts for packet in packets] != steps  # there are such frames


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    ("source", "codec"),
    [
        ("source.mp4", "aac"),
        ("source.mkv", "libmp3lame"),
        ("source.mkv", "libopus"),
        ("source.mkv", "mp2"),
        ("source.mkv", "flac"),
        ("source.ts", "ac3"),
        ("source.mov", "pcm_s16le"),
        ("source.avi", "pcm_s16le"),
    ],
)
def test_sound_of_any_kind_is_as_long_and_in_time_with_the_pictures(tmp_path, suffix, source, codec):
    path = write_source(tmp_path / source, codec)
    out = tmp_path / f"out{suffix}"
    join(out, write_pieces(tmp_path, timed_clip(), (9, 8, 8, 8, 8, 8, 8, 3), FPS), FPS, path)
    assert probe(out).frames in (60, None)
    assert len(probe(out).sound) == 1
    packet = FORMATS[codec][1] / RATE
    (before, length, _), (flash, _) = hear(path), see(path)
    (after, kept, start), (shown, first) = hear(out), see(out)
    assert abs((after - shown) - (before - flash)) < 0.003
    assert abs(kept - length) < max(packet, 1024 / RATE) + 0.003
    assert abs(start - first) < max(packet, 1024 / RATE) + 0.003


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    ("source", "codec"), [("source.mp4", "aac"), ("source.mkv", "pcm_s16le"), ("source.ts", "ac3")]
)
@pytest.mark.parametrize("delay", [0.5, -0.4])
def test_sound_stays_in_time_where_it_starts_earlier_or_later_than_the_pictures(tmp_path, suffix, source, codec, delay):
    shift = delay if delay > 0 else 0.0
    path = write_source(tmp_path / source, codec, delay=shift)
    if delay < 0:
        path = delayed_sound(path, tmp_path / f"later_{source}", -delay)
    out = tmp_path / f"out{suffix}"
    join(out, write_pieces(tmp_path, timed_clip(), (33, 27), FPS), FPS, path)
    (click, *_), (flash, _) = hear(path), see(path)
    (after, *_), (shown, _) = hear(out), see(out)
    assert abs((after - shown) - (click - flash)) < 0.003
    assert len(read_clip(out)) == 60


def delayed_sound(source, path, seconds):
    """Writes a clip whose sound starts so much later."""
    with av.open(str(source)) as before, av.open(str(path), "w") as after:
        streams = {stream.index: after.add_stream_from_template(stream) for stream in before.streams}
        for packet in before.demux():
            if packet.size:
                if packet.stream.type == "audio":
                    ticks = round(seconds / packet.time_base)
                    packet.pts = packet.dts = packet.pts + ticks
                packet.stream = streams[packet.stream.index]
                after.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(("source", "codec"), [("source.mp4", "aac"), ("source.mkv", "pcm_s16le")])
def test_sound_ends_with_the_pictures(tmp_path, suffix, source, codec):
    path, out = write_source(tmp_path / source, codec, frames=250, flash=7), tmp_path / f"out{suffix}"
    join(out, write_pieces(tmp_path, timed_clip(18, 7), (9, 9), FPS), FPS, path)
    click, kept, _ = hear(out)
    assert abs(click - see(out)[0]) < 0.003
    assert abs(kept - 18 / 25) < 2 * 1024 / RATE  # one that begins before the end, and in .mkv one before the start


def test_what_comes_after_the_end_of_the_pictures_is_not_read(tmp_path):
    path, out = write_source(tmp_path / "source.mkv", "mp2", frames=1000, flash=7), tmp_path / "out.mp4"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[: whole // 2] + bytes(whole // 2))  # damaged where nobody looks
    join(out, write_pieces(tmp_path, timed_clip(18, 7), (9, 9), FPS), FPS, path)
    assert abs(hear(out)[1] - 18 / 25) < 1024 / RATE + 0.003


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_every_track_is_kept(tmp_path, suffix, codec):
    path, out = write_source(tmp_path / "source.mov", codec, tracks=2), tmp_path / f"out{suffix}"
    join(out, write_pieces(tmp_path, timed_clip(), (60,), FPS), FPS, path)
    assert len(probe(out).sound) == 2
    for track in (0, 1):
        assert abs(hear(out, track)[0] - see(out)[0] - (hear(path, track)[0] - see(path)[0])) < 0.003


def test_sound_that_players_know_is_not_compressed_anew(tmp_path):
    path = write_source(tmp_path / "source.mp4", "aac")
    join(tmp_path / "out.mp4", write_pieces(tmp_path, timed_clip(), (33, 27), FPS), FPS, path)

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    assert packets(tmp_path / "out.mp4") == packets(path)


def test_a_file_without_sound_gives_none(tmp_path):
    (path,) = write_pieces(tmp_path, timed_clip(), (60,), FPS)
    join(tmp_path / "out.mp4", [path], Fraction(25), path)
    assert probe(tmp_path / "out.mp4").sound == ()


def spoil_sound(path):
    """Overwrites the contents of every packet of sound, and of nothing else."""
    with av.open(str(path)) as container:
        places = [(packet.pos, bytes(packet)) for packet in container.demux(audio=0) if packet.size]
    data = path.read_bytes()
    for _, content in places:
        data = data.replace(content, bytes(len(content) // 2) + b"\xff" * (len(content) - len(content) // 2))
    path.write_bytes(data)


def test_sound_that_does_not_decode_is_an_error_that_names_it_and_leaves_no_file(tmp_path):
    path = write_source(tmp_path / "source.mkv", "mp2")
    spoil_sound(path)
    with pytest.raises(ValueError, match=r"source\.mkv: its sound cannot be read"):
        join(tmp_path / "out.mp4", write_pieces(tmp_path, timed_clip(), (60,), FPS), FPS, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["piece0.mp4", "source.mkv"]


def test_sound_of_an_unknown_kind_is_an_error_that_names_it(tmp_path):
    path = write_source(tmp_path / "source.mov", "pcm_s16le")
    path.write_bytes(path.read_bytes().replace(b"sowt", b"zzzz"))
    assert probe(path).sound == ("unknown",)
    with pytest.raises(ValueError, match=r"source\.mov.* no decoder for its sound"):
        join(tmp_path / "out.mp4", write_pieces(tmp_path, timed_clip(), (60,), FPS), FPS, path)


@pytest.mark.parametrize("other", [(40, 48), (32, 64)])
def test_pieces_of_another_size_are_refused(tmp_path, other):
    (tmp_path / "other").mkdir()
    pieces = write_pieces(tmp_path, noise(9), (9,)) + write_pieces(tmp_path / "other", noise(9, size=other), (9,))
    with pytest.raises(ValueError, match="do not continue each other"):
        join(tmp_path / "out.mp4", pieces, NTSC)
    assert not (tmp_path / "out.mp4").exists()


def test_a_failure_keeps_the_old_file(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"the old one")
    pieces = write_pieces(tmp_path, noise(18), (9, 9))
    pieces[1].unlink()
    with pytest.raises(av.error.FileNotFoundError):
        join(tmp_path / "out.mp4", pieces, NTSC)
    assert (tmp_path / "out.mp4").read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "piece0.mp4"]


def test_joining_twice_gives_the_same_bytes(tmp_path):
    path = write_source(tmp_path / "source.mkv", "pcm_s16le")
    pieces = write_pieces(tmp_path, timed_clip(), (33, 27), FPS)
    for name in ("one.mp4", "two.mp4"):
        join(tmp_path / name, pieces, Fraction(25), path)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
