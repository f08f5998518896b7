"""`flax-vae eval`: what it measures, of which clips, and what it says and shows of it."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig, Execution, to_float, to_uint8
from flax_vae.io.video_reader import read_clip
from flax_vae.jobs.model import Model
from flax_vae.metrics.fvd import frechet_distance
from flax_vae.metrics.psnr import psnr
from flax_vae.metrics.seams import seam
from flax_vae.metrics.ssim import ssim
from tests import little

pytest.importorskip("av", reason="video files need PyAV")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib")

PLAIN = ("--no-lpips", "--no-fvd")


class Copy(nnx.Module):
    """A VAE in place of a real one, which is quicker: gives its input back, `off` levels darker at chosen places.

    In every chunk but the first the frames `places` are darker by `deeper` levels more.
    """

    def __init__(self, off=4, places=(), deeper=0):
        self.config, self.execution = CausalVideoVAEConfig.tiny(), Execution()
        self.off, self.places, self.deeper = off, places, deeper

    def encode_chunk(self, x, carry=None):
        return SimpleNamespace(mean=x), jnp.zeros(())

    def decode_chunk(self, x, carry=None):
        levels = jnp.full((1, x.shape[1], 1, 1, 1), float(self.off))
        if carry is not None:
            levels = levels.at[:, jnp.array(self.places, int)].add(self.deeper)
        return x - levels / 127.5, jnp.zeros(())


@pytest.fixture
def copying(monkeypatch, checkpoints):
    """Returns a function that has `flax-vae eval` load a `Copy`."""

    def use(*args, **options):
        vae: Any = Copy(*args, **options)
        monkeypatch.setattr("flax_vae.jobs.evaluation.evaluate.load", lambda *_, **__: Model(vae, vae, "0" * 16))
        return vae

    return use


@pytest.fixture
def no_picture(monkeypatch):
    """Has none drawn, which is quicker."""
    monkeypatch.setattr("flax_vae.cli.eval_report.draw", lambda path, *_: path.write_bytes(b"\x89PNG"))


@pytest.fixture
def evaluate(run, checkpoints, tmp_path, no_picture):
    """Runs the command, without LPIPS and rFVD, and gives what it wrote as well, if all went well."""

    def call(data, *args, without=PLAIN):
        code, out, err = run("eval", checkpoints / "vae", data, "--out", tmp_path / "out", *without, *args)
        if code:
            return code, out, err, None
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.json", "eval.png"]
        assert (tmp_path / "out/eval.png").read_bytes().startswith(b"\x89PNG")
        return code, out, err, json.loads((tmp_path / "out/eval.json").read_text())

    return call


def write(path, frames, seed=0, height=16, width=24):
    """Writes a clip of moving stripes, all of them brighter than black and darker than white, without loss."""
    from flax_vae.io.video_writer import VideoWriter

    random = np.random.default_rng(seed)
    stripes = random.integers(90, 160, (1, height, width, 3)) + np.arange(frames).reshape(-1, 1, 1, 1)
    with VideoWriter(path, 25, height, width, lossless=True) as writer:
        writer.write((stripes % 160).clip(60).astype(np.uint8))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two good clips, one of no pictures, and one that ends too early."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "a.mkv", 19)
    write(folder / "b.mkv", 3, seed=1)
    (folder / "text.mp4").write_text("this is no clip")
    whole = write(folder / "cut.mkv", 90, seed=2).read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: 3 * len(whole) // 4])
    return folder


def test_scores_are_those_of_the_clip_as_a_whole(run, randomized, jit, clip, tmp_path):
    vae = randomized(lambda rngs: CausalVideoVAE(little.ONE_BLOCK, rngs=rngs))
    vae.save_pretrained(tmp_path / "vae")
    code, out, err = run("eval", tmp_path / "vae", clip, "--frames", 18, "--out", tmp_path / "out", *PLAIN)
    assert code == 0
    pixels = read_clip(clip, (18, 24), 18)
    filled = to_float(np.concatenate([pixels, pixels[-1:]]))[None]
    again = to_uint8(jit(lambda vae, x: vae.decode(vae.encode(x).mode()), vae)(filled))[0, :18]
    alike = ssim(jnp.asarray(to_float(again))[None], jnp.asarray(to_float(pixels))[None])[0]
    found = json.loads((tmp_path / "out/eval.json").read_text())
    (scores,) = found["clips"]
    quality = [psnr(*pair) for pair in zip(pixels, again, strict=True)]
    assert scores["by_frame"]["psnr"] == pytest.approx(quality, abs=0.02)
    assert scores["by_frame"]["ssim"] == pytest.approx(np.asarray(alike).tolist(), abs=1e-3)
    assert found["overall"]["psnr"] == pytest.approx(np.mean(quality), abs=0.02)
    expected = seam([quality], 4, 2)
    assert expected is not None
    assert found["seam"]["score"] == pytest.approx(expected.score, abs=0.04)
    assert found["overall"]["frames"] == 18
    assert "1 of 1 clips have not 2k + 1 frames" in err
    assert f"{found['overall']['psnr']:.2f}" in out
    assert f"{found['overall']['ssim']:.4f}" in out


def test_a_clip_without_a_seam_scores_about_zero(evaluate, copying, tmp_path):
    copying()
    *_, out, _, found = evaluate(write(tmp_path / "a.mkv", 65))
    assert found["overall"]["psnr"] == pytest.approx(20 * np.log10(255 / 4), abs=1e-3)
    assert found["seam"]["score"] == pytest.approx(0, abs=1e-6)
    assert found["seam"]["borders"] == 3
    assert "0.00 \N{PLUS-MINUS SIGN} 0.00" in out


def test_a_clip_too_short_for_a_seam_says_so(evaluate, copying, tmp_path):
    copying()
    *_, err, found = evaluate(write(tmp_path / "a.mkv", 25))
    assert found["seam"]["score"] is None
    assert "no seam score: it needs a clip of 26 frames or more" in err


@pytest.mark.parametrize("places", [(0,), (15,), (0, 15), tuple(range(8))])
def test_frames_that_are_worse_at_the_borders_of_chunks_are_found(evaluate, copying, tmp_path, places):
    copying(places=places, deeper=4)
    *_, found = evaluate(write(tmp_path / "a.mkv", 65))
    assert found["seam"]["score"] == pytest.approx(-20 * np.log10(2), abs=1e-3)
    profile = np.array(found["by_position_in_chunk"]["psnr"])
    assert set(np.flatnonzero(profile < profile.max() - 1)) == set(places)


def test_broken_clips_are_listed_and_counted_and_change_no_number(evaluate, copying, folder, tmp_path):
    copying()
    *_, out, err, found = evaluate(folder)
    assert [Path(clip["path"]).name for clip in found["clips"]] == ["a.mkv", "b.mkv"]
    assert [Path(clip["path"]).name for clip in found["failed"]] == ["text.mp4", "cut.mkv"]
    assert found["overall"]["clips"] == found["overall"]["failed"] == 2
    assert "2 of 4 clips are left out" in err
    assert "text.mp4: no video or image" in err
    assert "cut.mkv: damaged or cut short" in err
    assert found["overall"]["frames"] == 22
    assert "mean of 2 clips" in out


def test_each_clip_counts_once_however_long(evaluate, copying, folder):
    copying(places=range(16), deeper=4)  # all but the first frame
    *_, found = evaluate(folder)
    a, b = (clip["psnr"] for clip in found["clips"])
    assert a != pytest.approx(b, abs=0.1)
    assert found["overall"]["psnr"] == pytest.approx((a + b) / 2, abs=1e-4)
    assert found["by_frame"]["psnr"][2] == pytest.approx(np.mean([c["by_frame"]["psnr"][2] for c in found["clips"]]))


def test_a_manifest_names_the_clips_and_frames_limits_them(evaluate, copying, folder):
    copying()
    lines = [{"video": "clips/b.mkv"}, {"video": "clips/a.mkv"}]
    (folder.parent / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    *_, err, found = evaluate(folder.parent / "list.jsonl", "--frames", 9, "--size", "16x16")
    assert [(clip["frames"], clip["height"], clip["width"]) for clip in found["clips"]] == [(3, 16, 16), (9, 16, 16)]
    assert "1 of 2 clips have fewer frames than asked for" in err


def test_images_are_clips_of_one_frame_and_equal_ones_score_100_db(evaluate, copying, pixels, tmp_path):
    from flax_vae.io.video_writer import write_image

    copying(off=0)
    (tmp_path / "images").mkdir()
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.png", pixels[number])
    *_, err, found = evaluate(tmp_path / "images")
    assert found["overall"] == {"clips": 3, "failed": 0, "frames": 3, "psnr": 100, "ssim": pytest.approx(1)}
    assert "seam" not in err


def test_no_usable_clip_is_an_error_before_any_work(evaluate, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "text.mp4").write_text("this is no clip")
    write(tmp_path / "clips" / "small.mkv", 2, height=8, width=8)
    code, _, err, _ = evaluate(tmp_path / "clips")
    assert code == 2
    assert "clips: no clip can be used" in err
    assert "text.mp4: no video or image" in err
    assert "small.mkv: 8x8 is too small to compare, expected 11 pixels" in err
    assert "loading" not in err
    assert not (tmp_path / "out").exists()


def test_clips_that_all_turn_out_to_be_damaged_are_an_error(evaluate, copying, folder):
    copying()
    code, _, err, _ = evaluate(folder / "cut.mkv")
    assert code == 2
    assert "no clip can be read to its end" in err
    assert "cut.mkv: damaged or cut short" in err


@pytest.mark.parametrize(
    ("data", "args", "message"),
    [
        ("no.mp4", (), "no.mp4: no such file"),
        ("no.jsonl", (), "no.jsonl: no such folder or manifest"),
        ("clip.mkv", ("--size", "4"), "too small, this model takes multiples of 8"),
        ("clip.mkv", ("--size", "big"), "--size big: expected"),
        ("clip.mkv", ("--frames", "0"), "--frames 0: expected 1 or more"),
        ("clip.mkv", ("--memory", "5MiB"), "needed for one latent at a time, and 5 MiB may be used"),
        ("clip.mkv", ("--lpips",), "--lpips and --no-lpips: give one of them"),
        ("clip.mkv", ("--out", "{tmp}/clip.mkv"), "clip.mkv: is a file; give a folder to write"),
        ("clip.mkv", ("--out", "{tmp}/no/out"), "there is no folder"),
        (".", ("--out", "{tmp}/out"), "out: is in the folder that is read"),
    ],
)
def test_wrong_input_is_named_and_leaves_no_trace(evaluate, copying, tmp_path, contents, data, args, message):
    copying()
    write(tmp_path / "clip.mkv", 2)
    before = contents(tmp_path)
    code, out, err, _ = evaluate(tmp_path / data, *(arg.format(tmp=tmp_path) for arg in args))
    assert code == 2
    assert message in err
    assert out == ""
    assert contents(tmp_path) == before


class Distance(nnx.Module):
    """What stands for LPIPS, which is quicker: the mean distance of pixels, times a weight."""

    def __init__(self):
        self.weight = nnx.Param(jnp.full((), 3.0))

    def __call__(self, video, target, chunk=None):
        return self.weight[...] * abs(video - target).mean(axis=(2, 3, 4))


def test_lpips_is_taken_of_the_8_bit_frames(evaluate, copying, monkeypatch, tmp_path):
    monkeypatch.setattr("flax_vae.metrics.lpips.package_file", lambda: Path("vgg16.ckpt"))
    monkeypatch.setattr("flax_vae.metrics.lpips.LPIPS.from_pretrained", Distance)
    copying(off=4.4)
    *_, out, _, found = evaluate(write(tmp_path / "a.mkv", 10), without=("--no-fvd",))
    assert found["clips"][0]["by_frame"]["lpips"] == pytest.approx([3 * 4 / 127.5] * 10, abs=1e-4)
    assert list(found["by_frame"]) == ["psnr", "ssim", "lpips"]
    assert f"{3 * 4 / 127.5:.4f}" in out


class Features(nnx.Module):
    """What stands for I3D, which is quicker: the mean colours of the first and the last frame."""

    def __call__(self, video):
        return video[:, [0, -1]].mean(axis=(2, 3)).reshape(len(video), -1)


def test_rfvd_is_of_all_whole_windows_of_16_frames_of_whole_clips(evaluate, copying, monkeypatch, folder, tmp_path):
    monkeypatch.setattr("flax_vae.metrics.fvd.package_file", lambda: Path("i3d.ckpt"))
    monkeypatch.setattr("flax_vae.metrics.fvd.I3D.from_pretrained", Features)
    copying(off=6)
    write(folder / "c.mkv", 50, seed=3)
    *_, out, err, found = evaluate(folder, without=("--no-lpips",))
    windows = [
        read_clip(folder / name)[16 * n :][:16] for name, count in (("a.mkv", 1), ("c.mkv", 3)) for n in range(count)
    ]
    before = np.array([to_float(window)[[0, -1]].mean(axis=(1, 2)).ravel() for window in windows])
    assert found["rfvd"]["windows"] == 4
    assert found["rfvd"]["value"] == pytest.approx(6 * (6 / 127.5) ** 2, rel=1e-3)  # they differ in their means alone
    assert found["rfvd"]["value"] == pytest.approx(frechet_distance(before, before - 6 / 127.5), abs=1e-5)
    assert "rFVD is of 4 windows" in err
    assert f"{found['rfvd']['value']:.1f}" in out


def test_rfvd_of_one_window_is_left_out(evaluate, copying, monkeypatch, tmp_path):
    monkeypatch.setattr("flax_vae.metrics.fvd.package_file", lambda: Path("i3d.ckpt"))
    monkeypatch.setattr("flax_vae.metrics.fvd.I3D.from_pretrained", Features)
    copying()
    *_, err, found = evaluate(write(tmp_path / "a.mkv", 31), without=("--no-lpips",))
    assert found["rfvd"] == {"value": None, "windows": 1, "frames_of_a_window": 16}
    assert "no rFVD: it needs two windows of 16 frames" in err


@pytest.mark.parametrize("score", ["lpips", "fvd"])
@pytest.mark.parametrize("wish", ["", "--", "--no-"])
def test_a_score_without_its_weights_is_left_out_with_a_note_or_an_error_where_it_is_asked_for(
    evaluate, copying, monkeypatch, tmp_path, score, wish
):
    def missing():
        raise FileNotFoundError

    monkeypatch.setattr(f"flax_vae.metrics.{score}.package_file", missing)
    copying()
    others = [option for option in PLAIN if option != f"--no-{score}"]
    code, _, err, found = evaluate(write(tmp_path / "a.mkv", 2), without=[*others, *([wish + score] if wish else [])])
    assert code == (2 if wish == "--" else 0)
    assert (f'pip install "flax_vae[{score}]"' in err) == (wish != "--no-")
    assert found is None or (list(found["by_frame"]) == ["psnr", "ssim"] and found["rfvd"] is None)


def test_memory_for_one_latent_alone_leaves_no_seam_score_and_that_is_said(evaluate, copying, monkeypatch, tmp_path):
    monkeypatch.setattr("flax_vae.jobs.evaluation.instruments.largest", lambda *_: 1)
    copying()
    *_, err, found = evaluate(write(tmp_path / "a.mkv", 33))
    assert "memory has room for 1 latent at a time, and a seam score needs 2" in err
    assert found["seam"]["score"] is None
    assert found["chunk"] == {"frames": 8, "frames_of_a_latent": 8}


def test_the_table_has_no_more_rows_than_one_can_read(evaluate, copying, folder, monkeypatch):
    monkeypatch.setattr("flax_vae.cli.eval_report.MAX_ROWS", 1)
    copying(places=range(16), deeper=4)
    *_, out, err, found = evaluate(folder)
    assert "the 1 of 2 clips with the lowest PSNR" in err
    assert "a.mkv" in out
    assert "b.mkv" not in out
    assert len(found["clips"]) == 2


@pytest.mark.parametrize("frames", [1, 2, 12, 13, 100, 1000])
def test_few_frames_of_a_clip_are_kept_evenly_spaced_and_the_worst_one(frames):
    from flax_vae.jobs.evaluation.measurement import SAMPLES, Measurement
    from flax_vae.jobs.evaluation.scores import Sample

    clip: Any = SimpleNamespace(path=Path("a.mkv"))
    instruments: Any = None
    measurement = Measurement(clip, instruments)
    picture = np.zeros((1, 1, 3), np.uint8)
    for number in range(frames):
        measurement.look(Sample(Path("a.mkv"), number, abs(number - 77), picture, picture))
    numbers = [sample.number for sample in measurement.chosen(1000)]
    assert numbers[0] == 0
    assert len(set(np.diff(numbers))) <= 1
    assert min(frames, SAMPLES // 2) <= len(numbers) <= SAMPLES
    assert frames - 1 - numbers[-1] <= frames / 2
    assert measurement.worst[0].number == min(77, frames - 1)
    assert [sample.number for sample in measurement.chosen(1)] == [numbers[len(numbers) // 2]]


@pytest.mark.parametrize("clips", [1, 2, 4, 6, 7, 100])
def test_the_frames_shown_are_shared_among_the_clips(clips):
    from flax_vae.jobs.evaluation.measurement import SHOWN, sharing

    shares = dict(sharing(clips))
    assert sum(shares.values()) == SHOWN
    assert set(shares) <= set(range(clips))
    assert len(shares) == min(clips, SHOWN)


def test_the_picture_names_what_it_shows(evaluate, copying, folder, monkeypatch):
    from matplotlib.figure import Figure

    from flax_vae.jobs.evaluation import picture

    monkeypatch.setattr("flax_vae.cli.eval_report.draw", picture.draw)
    words, write = [], Figure.text
    monkeypatch.setattr(Figure, "text", lambda self, x, y, text, **style: words.append(text) or write(self, x, y, text))
    copying(places=(3,), deeper=4)
    *_, found = evaluate(folder)
    assert "2 clips, 22 frames; 2 clips left out" in words
    assert words[0].endswith(f" on {folder.name}")
    assert not [text for text in words if os.sep in text]
    assert f"{found['overall']['psnr']:.2f} dB" in words
    assert "a.mkv\nframe 4\n30.07 dB, worst" in words
    assert {"input", "reconstruction", "difference \N{MULTIPLICATION SIGN}16"} < set(words)
