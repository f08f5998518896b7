"""Clips whose frames do not come at a constant rate: every frame keeps its time, through latents and pieces too."""

import functools
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from flax_vae.io.latents import Latents
from flax_vae.io.video_reader import probe, read_timed
from flax_vae.io.weights import SafetensorsFile

av = pytest.importorskip("av", reason="video files need PyAV")
pytest.importorskip("matplotlib", reason="contact sheets need matplotlib")

# a still, a burst, a still of two seconds, frames as a camera takes them, and a last one that stays
TIMES = [Fraction(i, 1000) for i in (0, 700, 716, 733, 750, 2750, 2783, 2817, 2849, 2884, 2916, 2950, 2984, 3017, 3050,
                                     3084, 3117, 3149, 3184, 3600)]  # fmt: skip
RATE = 48000


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Has every command of a test take one model, which costs more to load than short clips to encode."""
    from flax_vae.jobs import model

    load = functools.cache(model.load)
    for command in ("encode", "decode", "reconstruct", "extract"):
        monkeypatch.setattr(f"flax_vae.jobs.{command}.load", load)


def write_clip(path, pixels, late=0.0, is_loud=True):
    """Writes 19 frames at these times, without loss, and a tone from `late` seconds before to the end of the last."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264rgb", rate=30)
        video.height, video.width, video.pix_fmt, video.options = 18, 25, "rgb24", {"qp": "0", "bf": "0"}
        video.codec_context.time_base, start = Fraction(1, 1000), round(1000 * late)
        packets, ends = [], {round(1000 * a) + start: round(1000 * (b - a)) for a, b in pairwise(TIMES)}
        for picture, time in zip(pixels, ends, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            packets += video.encode(frame)
        packets += video.encode()
        for packet in packets:
            packet.duration = ends[packet.pts]
        if is_loud:
            sound = container.add_stream("aac", rate=RATE, layout="mono")
            wave = 0.1 * np.sin(np.arange(round((float(TIMES[-1]) + late) * RATE)) * 0.05)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, 0
            packets += [*sound.encode(frame), *sound.encode()]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, pixels):
    return write_clip(tmp_path_factory.mktemp("uneven") / "clip.mkv", pixels)


def times_of(path):
    spans = [(begin, end) for begin, end, _ in read_timed(path)]
    return [begin for begin, _ in spans] + [spans[-1][1]]


def assert_close(path, expected):
    """Compares times to the millisecond that a clock of Matroska rounds to."""
    found = times_of(path)
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= Fraction(1, 1000)


def heard(path):
    """Returns the seconds after the first frame at which the sound starts and ends."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.samples / frame.sample_rate) for frame in container.decode(audio=0)]
    return frames[0][0] - first, sum(frames[-1]) - first


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_reconstruction_shows_each_frame_when_the_clip_does_and_ends_with_its_sound(
    run, checkpoints, uneven, tmp_path, small_pieces, suffix
):
    out = tmp_path / f"again{suffix}"
    code, _, err = run("reconstruct", uneven, out, "--weights", checkpoints / "vae")
    assert code == 0
    assert f"{out}: each frame keeps its time, as not all follow at 30 a second" in err
    assert times_of(uneven) == TIMES
    assert_close(out, TIMES)
    assert abs(heard(out)[1] - float(TIMES[-1])) < 2 * 1024 / RATE


def test_pictures_that_start_late_stay_with_their_sound(run, checkpoints, pixels, tmp_path, small_pieces):
    clip, out = write_clip(tmp_path / "late.mkv", pixels, late=0.5), tmp_path / "again.mkv"
    assert run("reconstruct", clip, out, "--weights", checkpoints / "vae")[0] == 0
    assert_close(out, TIMES)
    for before, after in zip(heard(clip), heard(out), strict=True):
        assert abs(before - after) < 1024 / RATE


def test_a_part_ends_where_the_next_frame_begins(run, checkpoints, uneven, tmp_path, small_pieces):
    args = "--weights", checkpoints / "vae", "--frames", 5
    assert run("reconstruct", uneven, tmp_path / "again.mp4", *args)[0] == 0
    assert_close(tmp_path / "again.mp4", TIMES[:6])
    assert abs(heard(tmp_path / "again.mp4")[1] - float(TIMES[5])) < 2 * 1024 / RATE
    assert run("encode", uneven, tmp_path / "latents", *args)[0] == 0
    assert Latents(tmp_path / "latents").times == TIMES[:6]


def test_latents_keep_the_times_and_decode_to_them(run, checkpoints, uneven, tmp_path, small_pieces):
    weights = "--weights", checkpoints / "vae"
    assert run("encode", uneven, tmp_path / "latents", *weights)[0] == 0
    latents = Latents(tmp_path / "latents")
    assert len(latents.shards) == 3
    assert latents.times == TIMES
    assert SafetensorsFile(latents.shards[1].path).metadata["times"].startswith("[1000, 2884, 2916,")
    code, _, err = run("decode", tmp_path / "latents", tmp_path / "again.mp4", *weights)
    assert code == 0
    assert "again.mp4: each frame keeps its time" in err
    assert_close(tmp_path / "again.mp4", TIMES)


def test_a_constant_rate_is_all_that_is_kept_of_it(run, checkpoints, clip, tmp_path, small_pieces):
    weights = "--weights", checkpoints / "vae"
    assert len({after - before for before, after in pairwise(times_of(clip))}) > 1  # of a clock of milliseconds
    assert run("encode", clip, tmp_path / "latents", *weights)[0] == 0
    latents = Latents(tmp_path / "latents")
    assert not any("times" in SafetensorsFile(shard.path).metadata for shard in latents.shards)
    assert latents.times == [i / Fraction(30000, 1001) for i in range(20)]
    for command, source in (("decode", tmp_path / "latents"), ("reconstruct", clip)):
        code, _, err = run(command, source, tmp_path / f"{command}.mp4", *weights)
        assert code == 0
        assert "keeps its time" not in err
        assert times_of(tmp_path / f"{command}.mp4") == latents.times
        assert probe(tmp_path / f"{command}.mp4").fps == Fraction(30000, 1001)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_times_go_on_where_a_command_was_stopped(
    run, checkpoints, uneven, tmp_path, small_pieces, monkeypatch, contents, command, pieces
):
    from flax_vae.jobs.job import Job

    def stopped(self, *given):
        commit(self, *given)
        if self.progress.pieces == pieces:
            raise KeyboardInterrupt

    commit, name = Job.commit, "out" if command == "encode" else "out.mp4"
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
        args = command, uneven, tmp_path / folder / name, "--weights", checkpoints / "vae"
        if folder == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(Job, "commit", stopped)
                assert run(*args)[0] == 130
        assert run(*args, "--resume")[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_a_data_set_keeps_the_times_of_short_and_long_clips(run, checkpoints, uneven, pixels, tmp_path, monkeypatch):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "b.mkv", pixels, is_loud=False)
    (tmp_path / "clips" / "a.mkv").write_bytes(uneven.read_bytes())
    assert run("extract", tmp_path / "clips", tmp_path / "long", "--weights", checkpoints / "vae")[0] == 0
    for name in ("a.mkv", "b.mkv"):  # whose number of frames Matroska does not state
        assert Latents(tmp_path / "long" / "latents" / name).times == TIMES
    for name in ("a", "b"):
        write_clip(tmp_path / "clips" / f"{name}.mp4", pixels)
        (tmp_path / "clips" / f"{name}.mkv").unlink()
    assert run("extract", tmp_path / "clips", tmp_path / "short", "--weights", checkpoints / "vae")[0] == 0
    for name in ("a.mp4", "b.mp4"):
        assert Latents(tmp_path / "short" / "latents" / f"{name}.safetensors").times == TIMES
