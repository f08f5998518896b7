"""`flax-vae reconstruct`: clips, with their sound, and images, and what is lost of them."""

import re
from fractions import Fraction

import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, to_float, to_uint8
from flax_vae.io.video_reader import probe, read_clip
from flax_vae.metrics.psnr import psnr

av = pytest.importorskip("av", reason="video files need PyAV")
pytest.importorskip("matplotlib", reason="contact sheets need matplotlib")

NTSC = Fraction(30000, 1001)


def expected(checkpoints, source, frames):
    """Returns the frames as they are read, and as the whole clip at once would be reconstructed."""
    vae, pixels = CausalVideoVAE.from_pretrained(str(checkpoints / "vae")), read_clip(source, (16, 24), frames)
    filled = to_float(np.concatenate([pixels, np.repeat(pixels[-1:], -(len(pixels) - 1) % 8, axis=0)]))[None]
    again = nnx.jit(lambda vae, x: vae.decode(vae.encode(x).mode()))(vae, filled)
    return pixels, to_uint8(again)[0, : len(pixels)]


def write_clip(path, pixels, sound=None, fps=25, delay=0.0, tracks=1):
    """Writes frames (T, H, W, 3) with a steady tone beside them, which starts `delay` seconds before."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = pixels.shape[1], pixels.shape[2] // 2 * 2, "yuv420p"
        sounds = [container.add_stream(sound, rate=48000, layout="stereo") for _ in range(tracks if sound else 0)]
        packets = []
        for number, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:, : video.width]), format="rgb24")
            frame.time_base = Fraction(1, 1000 * fps)
            frame.pts = number * 1000 + round(delay * 1000 * fps)
            packets += video.encode(frame)
        packets += video.encode()
        for track in sounds:
            for start in range(0, round((len(pixels) / fps + delay) * 48000), 960):
                wave = 0.1 * np.sin(np.arange(start, start + 960) * 0.05)
                frame = av.AudioFrame.from_ndarray(np.array([wave, wave], np.float32), "fltp", "stereo")
                frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                packets += track.encode(frame)
            packets += track.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def heard(path):
    """Returns the seconds of sound, relative to the first frame: where it starts and where it ends."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.samples / frame.sample_rate) for frame in container.decode(audio=0)]
    return frames[0][0] - first, sum(frames[-1]) - first


def test_clip_and_sheet_are_written_and_the_psnr_is_that_of_the_whole_clip(
    run, checkpoints, clip, tmp_path, small_pieces
):
    code, out, err = run("reconstruct", clip, tmp_path / "again.mp4", "--weights", checkpoints / "vae")
    assert code == 0
    assert "19 frames are not 8k + 1: the last one is repeated to make 25" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.mp4", "again_sheet.png"]
    assert read_clip(tmp_path / "again.mp4").shape == (19, 16, 24, 3)
    assert probe(tmp_path / "again.mp4").fps == NTSC
    assert (tmp_path / "again_sheet.png").read_bytes().startswith(b"\x89PNG")

    quality = [psnr(a, b) for a, b in zip(*expected(checkpoints, clip, 19), strict=True)]
    (mean, _), (worst, frame) = re.findall(r"PSNR, \D+([\d.]+) dB(?: \(frame (\d+)\))?", out)
    assert float(mean) == pytest.approx(np.mean(quality), abs=0.02)
    assert float(worst) == pytest.approx(min(quality), abs=0.02)
    assert int(frame) == np.argmin(quality)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(("source", "sound"), [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.mov", "pcm_s16le")])
def test_sound_and_rate_are_kept(run, checkpoints, pixels, tmp_path, small_pieces, suffix, source, sound):
    path = write_clip(tmp_path / source, pixels, sound)
    code, _, err = run("reconstruct", path, tmp_path / f"again{suffix}", "--weights", checkpoints / "vae")
    assert code == 0
    assert "no sound" not in err
    assert probe(tmp_path / f"again{suffix}").fps == 25
    for before, after in zip(heard(path), heard(tmp_path / f"again{suffix}"), strict=True):
        assert abs(before - after) < 0.045


def test_sound_is_cut_with_the_frames_and_pictures_that_start_late_stay_in_time(
    run, checkpoints, pixels, tmp_path, small_pieces
):
    path, out = write_clip(tmp_path / "a.mkv", pixels, "aac", delay=0.5), tmp_path / "again.mkv"
    assert run("reconstruct", path, out, "--weights", checkpoints / "vae", "--frames", 9)[0] == 0
    assert len(read_clip(out)) == 9
    (before, _), (start, end) = heard(path), heard(out)
    assert abs(start - before) < 0.025
    assert abs(end - 9 / 25) < 0.045


def test_all_tracks_are_kept_and_a_clip_without_sound_gets_none(run, checkpoints, pixels, tmp_path, small_pieces):
    for tracks, sound in ((2, "aac"), (0, None)):
        path = write_clip(tmp_path / "a.mp4", pixels, sound, tracks=tracks)
        assert run("reconstruct", path, tmp_path / "again.mp4", "--weights", checkpoints / "vae")[0] == 0
        assert len(probe(tmp_path / "again.mp4").sound) == tracks


@pytest.mark.parametrize("kind", ["unknown", "broken"])
def test_sound_that_cannot_be_read_is_left_out_and_that_is_said(run, checkpoints, pixels, tmp_path, small_pieces, kind):
    path = write_clip(
        tmp_path / ("a.mov" if kind == "unknown" else "a.mkv"), pixels, "pcm_s16le" if kind == "unknown" else "mp2"
    )
    data = path.read_bytes()
    if kind == "unknown":
        data = data.replace(b"sowt", b"zzzz")
    else:
        with av.open(str(path)) as container:
            for packet in container.demux(audio=0):
                if packet.size:
                    data = data.replace(bytes(packet), bytes(packet.size))
    path.write_bytes(data)
    code, _, err = run("reconstruct", path, tmp_path / "again.mp4", "--weights", checkpoints / "vae")
    assert code == 0
    assert f"the clip gets no sound: {path}" in err
    assert probe(tmp_path / "again.mp4").sound == ()
    assert len(read_clip(tmp_path / "again.mp4")) == 19


def test_a_header_that_states_another_number_of_frames_is_found_out(run, checkpoints, pixels, tmp_path, small_pieces):
    path = write_clip(tmp_path / "a.avi", np.concatenate([pixels] * 2))
    data = bytearray(path.read_bytes())
    place = data.index(b"strh") + 8 + 32  # dwLength of the stream: frames
    assert int.from_bytes(data[place : place + 4], "little") == 38
    data[place : place + 4] = (30).to_bytes(4, "little")
    path.write_bytes(data)
    code, _, err = run("reconstruct", path, tmp_path / "again.mp4", "--weights", checkpoints / "vae")
    assert code == 0
    assert "a.avi states 30 frames, but 38 were read" in err
    assert len(read_clip(tmp_path / "again.mp4")) == 38


def test_a_clip_shorter_than_asked_for_says_so(run, checkpoints, clip, tmp_path, small_pieces):
    code, _, err = run("reconstruct", clip, tmp_path / "a.mp4", "--weights", checkpoints / "vae", "--frames", 25)
    assert code == 0
    assert "has 19 frames, fewer than the 25 asked for" in err


def test_an_image_becomes_an_image_and_a_folder_of_them_a_folder(run, checkpoints, pixels, tmp_path, contents):
    from flax_vae.io.video_writer import write_image

    images, weights = tmp_path / "images", ("--weights", checkpoints / "vae")
    images.mkdir()
    for number, name in enumerate(("a.png", "b.c.png")):
        write_image(images / name, pixels[number])
    code, out, _ = run("reconstruct", images, tmp_path / "again", *weights)
    assert code == 0
    assert f"{images}: 2 frames" in out
    assert sorted(contents(tmp_path / "again")) == ["a.png", "a_sheet.png", "b.c.png", "b.c_sheet.png"]
    code, _, _ = run("reconstruct", images / "a.png", tmp_path / "one.png", *weights)
    assert code == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "again" / "a.png").read_bytes()
    for name in ("a.png", "b.c.png"):
        _, wanted = expected(checkpoints, images / name, 1)
        assert np.abs(read_clip(tmp_path / "again" / name).astype(int) - wanted).max() <= 1
    code, out, err = run("reconstruct", images, tmp_path / "again", *weights, "--resume")
    assert code == 0
    assert "2 of 2 are there already" in err
    code, _, err = run("reconstruct", tmp_path / "again", tmp_path / "twice", *weights)
    assert code == 2
    assert "the sheets of a, b.c would be named as other images" in err
    assert not (tmp_path / "twice").exists()


def test_the_sheet_does_not_replace_the_image_that_is_read(run, checkpoints, pixels, tmp_path):
    from flax_vae.io.video_writer import write_image

    write_image(tmp_path / "a_sheet.png", pixels[0])
    before = (tmp_path / "a_sheet.png").read_bytes()
    code, _, err = run("reconstruct", tmp_path / "a_sheet.png", tmp_path / "a.mp4", "--weights", checkpoints / "vae")
    assert code == 2
    assert "a_sheet.png: is the file that is read" in err
    assert (tmp_path / "a_sheet.png").read_bytes() == before


@pytest.mark.slow
def test_tiles_that_a_frame_fits_in_change_nothing_and_that_is_measured(run, checkpoints, clip, tmp_path, small_pieces):
    args = "--weights", checkpoints / "vae", "--frames", 9, "--lossy-tiles", "--measure-tiles"
    code, out, _ = run("reconstruct", clip, tmp_path / "a.mp4", *args)
    assert code == 0
    assert "PSNR of lossy tiles against none, first 9 frames" in out
    (measured,) = re.findall(r"first 9 frames\D*?([\d.]+|inf) dB", out)
    assert float(measured) > 100


@pytest.mark.parametrize("frames", [1, 63, 64, 65, 128, 129, 1000])
def test_samples_of_a_clip_are_evenly_spaced_and_few_whatever_its_pieces(tmp_path, frames):
    from flax_vae.jobs.frames import SAMPLES, Loss, losses
    from flax_vae.jobs.job import Job

    after = np.arange(frames * 12).reshape(frames, 2, 2, 3).astype(np.uint8)
    before = after + np.uint8(1)
    with Job(tmp_path / "a", {}, False) as job:
        start = 0
        for length in [1, 5, *[77] * 13]:
            cut = slice(start, min(start + length, frames))
            if start < frames:
                loss = Loss(start)  # as one that goes on
                loss.add(before[cut], after[cut])
                loss.save(job.piece(".npz"))
                job.commit(None, cut.stop - start, 1, cut.stop == frames)
            start += length
        quality, numbers, first, second = losses(job)
    assert len(quality) == frames
    assert len(numbers) <= SAMPLES
    assert len(set(np.diff(numbers))) <= 1
    assert numbers[0] == 0
    assert numbers[-1] >= frames - 2 * (numbers[1] if len(numbers) > 1 else 1)
    assert np.array_equal(first, before[numbers])
    assert np.array_equal(second, after[numbers])
