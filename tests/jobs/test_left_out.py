"""What is wrong with one clip ends the work on that clip alone: the others are done, and it is listed."""

import errno
import json
import math
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_vae.io.latents import Latents, write_latents
from flax_vae.io.video_writer import VideoWriter, write_image
from tests.slow import some_slow

pytest.importorskip("av", reason="video files need PyAV")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def lines(path):
    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """Returns a function that copies the checkpoint, with one value of a tensor replaced."""

    def make(key, value):
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoints / "vae", folder)
        tensors = load_file(folder / WEIGHTS)
        tensors[key].flat[0] = value
        save_file(tensors, folder / WEIGHTS)
        return folder

    return make


@pytest.fixture
def images(tmp_path, pixels):
    """A folder of three images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate("abc"):
        write_image(folder / f"{name}.png", pixels[number])
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder.conv_out.conv.bias", math.nan),
        ("quant_conv.conv.bias", math.inf),
    ],
)
def test_latents_that_are_not_finite_are_refused_and_nothing_is_written(
    run, damaged, clip, images, tmp_path, contents, key, value
):
    weights, before = ("--weights", damaged(key, value)), contents(tmp_path)
    code, _, err = run("encode", clip, tmp_path / "latents", *weights)
    assert code == 2
    assert f"flax-vae: {clip}: latents hold NaN or infinity" in err or f"{clip}: variances of latents hold NaN" in err
    assert contents(tmp_path) == before
    code, _, err = run("encode", images, tmp_path / "latents", *weights)
    assert code == 2
    assert "images: 3 of 3 cannot be done and are left out:\n" in err
    assert not list(tmp_path.glob("latents/[!.]*"))


def test_extraction_lists_clips_whose_latents_are_not_finite(run, damaged, images, tmp_path, clip, small_pieces):
    shutil.copy(clip, images / "long.mkv")
    out = tmp_path / "out"
    code, _, err = run("extract", images, out, "--weights", damaged("encoder.conv_out.conv.bias", math.nan))
    assert code == 2
    assert f"{images}: no clip can be encoded\n{images / 'a.png'}: latents hold NaN" in err
    assert [line.get("image") or line["video"] for line in lines(out / "failed.jsonl")] == [
        str(images / name) for name in ("a.png", "b.png", "c.png", "long.mkv")
    ]
    assert lines(out / "manifest.jsonl") == []
    assert not (out / "statistics.json").exists()
    assert not list((out / "latents").iterdir())


def spoil_second(monkeypatch):
    """Has the pixels of b.png be NaN."""
    from flax_vae.jobs.clip import Clip

    chunks = Clip.chunks

    def spoiled(clip, *args):
        for chunk in chunks(clip, *args):
            if clip.path.name == "b.png":
                chunk.data[...] = np.nan
            yield chunk

    monkeypatch.setattr(Clip, "chunks", spoiled)


def test_one_clip_that_overflows_does_not_spoil_the_statistics_of_the_others(
    run, checkpoints, images, tmp_path, monkeypatch
):
    spoil_second(monkeypatch)
    assert run("extract", images, tmp_path / "out", "--weights", checkpoints / "vae")[0] == 0
    assert [line["image"] for line in lines(tmp_path / "out" / "failed.jsonl")] == [str(images / "b.png")]
    stated = json.loads((tmp_path / "out" / "statistics.json").read_text(), parse_constant=no_constant)
    assert np.isfinite(stated["first"]["mean"]).all()
    assert stated["first"]["count"] == 2 * 2 * 3


@pytest.mark.parametrize("command", some_slow(["encode", "reconstruct"], ("reconstruct",)))
def test_good_images_of_a_folder_are_done_and_bad_ones_listed(run, checkpoints, images, tmp_path, contents, command):
    pytest.importorskip("matplotlib", reason="contact sheets need matplotlib")
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:60])
    (images / "empty.png").touch()
    write_image(images / f"{'n' * 250}.png", np.zeros((16, 24, 3), np.uint8))
    args = command, images, tmp_path / "out", "--weights", checkpoints / "vae"
    code, _, err = run(*args)
    assert code == 2
    assert "images: 3 of 5 cannot be done and are left out:\n" in err
    for said in ("b.png: damaged or cut short", "empty.png: the file is empty", "n.png: nothing can be written under"):
        assert said in err
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == ({"a", "c"} if command == "encode" else {"a.png", "a_sheet.png", "c.png", "c_sheet.png"})
    (images / "b.png").write_bytes((images / "a.png").read_bytes())
    before = contents(tmp_path / "out")
    code, _, err = run(*args, "--resume")
    assert "2 of 5 are there already" in err
    assert "2 of 3 cannot be done" in err
    assert contents(tmp_path / "out").items() > before.items()


def test_a_folder_without_any_good_image_is_refused_before_any_work(run, checkpoints, images, tmp_path):
    for path in images.iterdir():
        path.write_text("no image")
    code, _, err = run("encode", images, tmp_path / "out", "--weights", checkpoints / "vae")
    assert code == 2
    assert "3 of 3 cannot be done" in err
    assert "loading" not in err
    assert not (tmp_path / "out").exists()


def test_good_latents_of_a_folder_are_decoded_and_bad_ones_listed(run, checkpoints, images, tmp_path):
    weights = "--weights", checkpoints / "vae"
    assert run("encode", images, tmp_path / "latents", *weights)[0] == 0
    held = Latents(tmp_path / "latents" / "b")
    write_latents(tmp_path / "latents" / "nan", held.about, held.read(), held.read("logvar"), 1)
    spoil = bytearray((tmp_path / "latents" / "nan").read_bytes())
    spoil[-4 * held.read().size * 2 :] = b"\xff" * (4 * held.read().size * 2)  # every one of them NaN
    (tmp_path / "latents" / "nan").write_bytes(spoil)
    (tmp_path / "latents" / "notes.txt").write_text("mine")
    (tmp_path / "latents" / "b" / "00000.safetensors").write_bytes(b"torn")
    code, _, err = run("decode", tmp_path / "latents", tmp_path / "again", *weights)
    assert code == 2
    assert "latents: 3 of 5 cannot be done and are left out:\n" in err
    assert "latents/nan: frames hold NaN" in err
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"a.png", "c.png"}


def failing(path, code):
    """Returns an error of the system about a file."""
    return OSError(code, os.strerror(code), str(path))


@pytest.mark.parametrize("name", ["b.png", "long.mkv"])
@pytest.mark.parametrize(
    ("where", "code"), [("read", errno.EIO), ("read", errno.EACCES), ("written", errno.ENAMETOOLONG)]
)
def test_an_error_of_the_system_about_one_clip_is_that_clips(
    run, checkpoints, images, clip, tmp_path, monkeypatch, name, where, code
):
    from flax_vae.jobs import clip as clips
    from flax_vae.jobs import extract

    monkeypatch.setattr("flax_vae.jobs.extract.PIECE_LATENTS", 1)
    shutil.copy(clip, images / "long.mkv")
    if where == "read":
        read_timed = clips.read_timed

        def fail(path, *args):
            if path.name == name:
                raise failing(path, code)
            yield from read_timed(path, *args)

        monkeypatch.setattr(clips, "read_timed", fail)
    else:
        target = extract.Extraction.target

        def no_target(self, entry, suffix):
            if entry.path.name == name:
                raise failing(entry.path, code)
            return target(self, entry, suffix)

        monkeypatch.setattr(extract.Extraction, "target", no_target)
    assert run("extract", images, tmp_path / "out", "--weights", checkpoints / "vae")[0] == 0
    (failed,) = lines(tmp_path / "out" / "failed.jsonl")
    assert os.strerror(code) in failed["error"]
    assert str(images / name) in failed["error"]
    assert len(lines(tmp_path / "out" / "manifest.jsonl")) == 3
    assert not [path for path in (tmp_path / "out").rglob(".*") if not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    "code", some_slow([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], (errno.EDQUOT, errno.EROFS))
)
def test_an_error_of_the_disk_that_is_written_ends_the_extraction(
    run, checkpoints, images, tmp_path, monkeypatch, code
):
    def fail(path, *_, **__):
        raise failing(path, code)

    monkeypatch.setattr("flax_vae.jobs.extract.write_latents", fail)
    args = "extract", images, tmp_path / "out", "--weights", checkpoints / "vae"
    exit_code, _, err = run(*args)
    assert exit_code == 2
    assert os.strerror(code) in err
    assert not (tmp_path / "out" / "failed.jsonl").exists()
    monkeypatch.undo()
    assert run(*args)[0] == 0
    assert len(lines(tmp_path / "out" / "manifest.jsonl")) == 3


def test_names_that_collide_are_listed_and_leave_nothing_behind(run, checkpoints, images, tmp_path):
    """A folder is named as the latents of an image beside it."""
    deep = images / "a.png.safetensors"
    deep.mkdir()
    shutil.copy(images / "b.png", deep / "deep.png")
    assert run("extract", images, tmp_path / "out", "--weights", checkpoints / "vae")[0] == 0
    (failed,) = lines(tmp_path / "out" / "failed.jsonl")
    assert "nothing can be written under its name" in failed["error"]
    assert {path.name for path in (tmp_path / "out").iterdir() if "log-" not in path.name} == {
        *("latents", "manifest.jsonl", "failed.jsonl", "statistics.json")
    }


def test_a_long_name_costs_that_clip_alone(run, checkpoints, images, tmp_path, pixels):
    write_image(images / f"{'b' * 245}.png", pixels[0])
    with VideoWriter(images / f"{'c' * 250}.mkv", 25, 18, 25, lossless=True) as writer:
        writer.write(pixels)
    assert run("extract", images, tmp_path / "out", "--weights", checkpoints / "vae")[0] == 0
    failed = lines(tmp_path / "out" / "failed.jsonl")
    assert ["File name too long" in line["error"] for line in failed] == [True, True]
    assert len(lines(tmp_path / "out" / "manifest.jsonl")) == 3


@pytest.mark.parametrize(
    "line",
    [
        {"path": "a", "latents": "b"},
        {"path": "a", "latents": "b", "statistics": {"first": {}, "rest": {}}},
        {"path": "a", "latents": "b", "statistics": [1]},
        {"path": 3, "error": "no"},
        {"error": "no"},
    ],
)
def test_a_log_that_is_damaged_is_named_before_any_work(run, checkpoints, images, tmp_path, line):
    args = "extract", images, tmp_path / "out", "--weights", checkpoints / "vae"
    assert run(*args, "--part", "1/2")[0] == 0
    (log,) = (tmp_path / "out").glob("log-*")
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")
    code, _, err = run(*args, "--part", "1/2")
    assert code == 2
    assert f"{log}: is damaged, it says of a clip {{" in err


def test_an_evaluation_lists_a_clip_that_comes_out_as_nan(run, checkpoints, images, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    spoil_second(monkeypatch)
    args = "--out", tmp_path / "eval", "--no-lpips", "--no-fvd"
    code, _, err = run("eval", checkpoints / "vae", images, *args)
    assert code == 0
    assert f"{images / 'b.png'}: frames hold NaN" in err
    found = json.loads((tmp_path / "eval" / "eval.json").read_text(), parse_constant=no_constant)
    assert [clip["path"] for clip in found["clips"]] == [str(images / "a.png"), str(images / "c.png")]
    assert found["overall"]["psnr"] is not None
