"""`flax-vae encode` and `flax-vae decode`: clips, images and folders of them, to latents and back."""

import json
import re
from fractions import Fraction
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, LatentScaling, to_float, to_uint8
from flax_vae.families.registry import released_scaling
from flax_vae.io.latents import Latents
from tests.slow import some_slow

pytest.importorskip("av", reason="video files need PyAV")


def model(checkpoints, name="vae"):
    return CausalVideoVAE.from_pretrained(str(checkpoints / name))


def whole(vae, pixels):
    """Returns the distribution of latents of a clip (T, H, W, 3) that is filled to 8k + 1 frames, computed at once."""
    filled = np.concatenate([pixels, np.repeat(pixels[-1:], -(len(pixels) - 1) % 8, axis=0)])
    return nnx.jit(CausalVideoVAE.encode)(vae, jnp.asarray(to_float(filled))[None])


def close(a, b):
    return np.allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.fixture
def write_image(pixels):
    """Returns a function that writes one of the frames to a file."""
    import flax_vae.io.video_writer

    def write(path, number=0):
        flax_vae.io.video_writer.write_image(path, pixels[number])
        return path

    return write


def test_encode_and_decode_of_ten_frames_give_ten_frames_as_the_whole_clip_would(
    run, checkpoints, clip, tmp_path, monkeypatch
):
    import functools

    from flax_vae.io import video_reader as video
    from flax_vae.io.video_writer import VideoWriter

    monkeypatch.setattr("flax_vae.jobs.frames.VideoWriter", functools.partial(VideoWriter, lossless=True))
    weights = "--weights", checkpoints / "vae"
    code, out, err = run("encode", clip, tmp_path / "latents", *weights, "--frames", 10)
    assert code == 0
    assert "18x25 (height x width), scaled and cropped to 16x24" in err
    assert "10 frames are not 8k + 1: the last one is repeated to make 17" in err
    assert "1 x 3 x 2 x 3 x 16" in out
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    vae, latents = model(checkpoints), Latents(tmp_path / "latents")
    posterior = whole(vae, video.read_clip(clip, (16, 24), 10))
    assert (latents.frames, latents.about.fps, latents.about.scaling) == (10, Fraction(30000, 1001), None)
    assert (latents.about.height, latents.about.width) == (16, 24)
    assert close(latents.read(), posterior.mean)
    assert close(latents.read("logvar"), posterior.logvar)

    code, _, err = run("decode", tmp_path / "latents", tmp_path / "again.mkv", *weights)
    assert code == 0
    assert "other weights" not in err
    assert video.probe(tmp_path / "again.mkv").fps == Fraction(30000, 1001)
    decoded = to_uint8(nnx.jit(CausalVideoVAE.decode)(vae, posterior.mean))[0, :10]
    again = video.read_clip(tmp_path / "again.mkv")
    assert again.shape == decoded.shape
    assert np.abs(again.astype(int) - decoded).max() <= 1


@pytest.mark.parametrize("frames", some_slow([1, 2, 8, 9, 10, 16, 17, 18], (2, 10, 16, 18)))
def test_any_number_of_frames_comes_back_in_pieces(run, checkpoints, clip, tmp_path, small_pieces, frames):
    from flax_vae.io.video_reader import read_clip

    weights = "--weights", checkpoints / "vae"
    assert run("encode", clip, tmp_path / "latents", *weights, "--frames", frames)[0] == 0
    latents = Latents(tmp_path / "latents")
    assert latents.frames == frames
    assert sum(shard.frames for shard in latents.shards) == frames
    assert [shard.shape[1] for shard in latents.shards] == ([1] if frames == 1 else [2, 1, 1][: -(-(frames - 1) // 8)])
    assert run("decode", tmp_path / "latents", tmp_path / "again.mp4", *weights)[0] == 0
    assert len(read_clip(tmp_path / "again.mp4")) == frames


def test_pieces_and_the_whole_have_the_same_latents(run, checkpoints, clip, tmp_path, small_pieces):
    from flax_vae.io.video_reader import read_clip

    assert run("encode", clip, tmp_path / "latents", "--weights", checkpoints / "vae")[0] == 0
    latents, posterior = Latents(tmp_path / "latents"), whole(model(checkpoints), read_clip(clip, (16, 24)))
    assert len(latents.shards) == 3
    assert close(latents.read(), posterior.mean)
    assert close(latents.read("logvar"), posterior.logvar)


@pytest.fixture
def latents(run, checkpoints, clip, tmp_path, small_pieces):
    """Latents of 17 frames in two files."""
    assert run("encode", clip, tmp_path / "latents", "--weights", checkpoints / "vae", "--frames", 17)[0] == 0
    return tmp_path / "latents"


def test_decode_refuses_latents_of_another_config_and_names_both(run, checkpoints, latents, tmp_path):
    code, _, err = run("decode", latents, tmp_path / "a.mp4", "--weights", checkpoints / "other")
    assert code == 2
    assert re.search(r"comes from a model of another config \(hash \w{16}; that of \S+ is \w{16}\)", err)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_decode_with_other_weights_says_so(run, checkpoints, latents, tmp_path):
    code, _, err = run("decode", latents, tmp_path / "a.mp4", "--weights", checkpoints / "again")
    assert code == 0
    assert re.search(
        r"latents: comes from other weights of the same config, or from another precision \(hash \w{16}\)", err
    )


def test_decode_refuses_a_clip_whose_end_is_missing(run, checkpoints, latents, tmp_path):
    (latents / "00001.safetensors").unlink()
    code, _, err = run("decode", latents, tmp_path / "a.mp4", "--weights", checkpoints / "vae")
    assert code == 2
    assert "lacks its end" in err
    assert not (tmp_path / "a.mp4").exists()


def test_decode_refuses_latents_that_say_they_are_of_other_frames(run, checkpoints, latents, tmp_path):
    from flax_vae.io.latents import write_latents

    held = Latents(latents)
    for height, frames in ((32, 17), (16, 5), (-16, 17), (10**12, 17), (16, 10**15)):
        about = held.about.__class__(**{**vars(held.about), "height": height})
        write_latents(tmp_path / "x.safetensors", about, held.read(), held.read("logvar"), frames)
        code, _, err = run("decode", tmp_path / "x.safetensors", tmp_path / "a.mp4", "--weights", checkpoints / "vae")
        assert code == 2
        assert "x.safetensors" in err
        assert not (tmp_path / "a.mp4").exists()


def test_encode_replaces_latents_and_leaves_other_folders_alone(run, checkpoints, clip, latents, tmp_path, contents):
    before = contents(latents)
    args = "--weights", checkpoints / "vae", "--frames", 9
    assert run("encode", clip, latents, *args)[0] == 0
    assert list(contents(latents)) == ["00000.safetensors"]
    assert contents(latents) != before
    (latents / "notes.txt").write_text("mine")
    code, _, err = run("encode", clip, latents, *args)
    assert code == 2
    assert "holds other files than latents, notes.txt" in err
    assert (latents / "notes.txt").read_text() == "mine"


def test_scaling_of_a_released_variant_and_of_a_file_is_noted_beside_the_latents(run, checkpoints, clip, tmp_path):
    args = "--weights", checkpoints / "vae", "--frames", 1, "--scaling"
    own = LatentScaling((0.5,) * 16, (2.0,) * 16, 0.0, 1.0)
    (tmp_path / "statistics.json").write_text(json.dumps({"first": {}, "scaling": own.to_dict()}))
    for given, wanted in (("sd3", released_scaling("sd3")), (tmp_path / "statistics.json", own)):
        assert run("encode", clip, tmp_path / "a", *args, given)[0] == 0
        assert LatentScaling.from_dict(Latents(tmp_path / "a").about.scaling) == wanted


def test_statistics_without_scaling_are_refused(run, checkpoints, clip, tmp_path):
    for name, values in (("images", {"scaling": None}), ("list", [1]), ("strings", {"scaling": {"first_shift": "0"}})):
        (tmp_path / name).write_text(json.dumps(values))
        code, _, err = run(
            "encode", clip, tmp_path / "a", "--weights", checkpoints / "vae", "--scaling", tmp_path / name
        )
        assert code == 2
        assert f"{tmp_path / name}: holds no statistics of latents" in err


def test_an_image_becomes_one_latent_and_a_png_again_exactly(run, checkpoints, write_image, tmp_path):
    from flax_vae.io.video_reader import read_clip

    image, weights = write_image(tmp_path / "image.png"), ("--weights", checkpoints / "vae")
    assert run("encode", image, tmp_path / "latents", *weights)[0] == 0
    vae, latents = model(checkpoints), Latents(tmp_path / "latents")
    posterior = whole(vae, read_clip(image, (16, 24)))
    assert latents.shape == (1, 2, 3, 16)
    assert close(latents.read(), posterior.mean)
    assert run("decode", tmp_path / "latents", tmp_path / "again.png", *weights)[0] == 0
    decoded = to_uint8(nnx.jit(CausalVideoVAE.decode)(vae, jnp.asarray(latents.read())))[0]
    assert np.abs(read_clip(tmp_path / "again.png").astype(int) - decoded).max() <= 1
    assert run("decode", tmp_path / "latents", tmp_path / "again.mp4", *weights)[0] == 0
    assert len(read_clip(tmp_path / "again.mp4")) == 1


def test_a_clip_is_no_image(run, checkpoints, latents, tmp_path):
    code, _, err = run("decode", latents, tmp_path / "a.png", "--weights", checkpoints / "vae")
    assert code == 2
    assert "a.png: expected a name that ends in .mp4" in err


@pytest.fixture
def images(write_image, tmp_path):
    """A folder of three images, one with dots in its name, and of what is none."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.001.png", "b.002.png")):
        write_image(folder / name, number)
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden.png").write_text("no image")
    return folder


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_folder_of_latents_and_of_images_again(
    run, checkpoints, images, tmp_path, contents
):
    from flax_vae.io.video_reader import read_clip

    weights = "--weights", checkpoints / "vae"
    code, _, err = run("encode", images, tmp_path / "latents", *weights)
    assert code == 0
    assert "left out as no images: deep, notes.txt\n" in err
    assert sorted(contents(tmp_path / "latents")) == [f"{name}/00000.safetensors" for name in ("a", "b.001", "b.002")]
    assert run("decode", tmp_path / "latents", tmp_path / "again", *weights)[0] == 0
    assert sorted(contents(tmp_path / "again")) == ["a.png", "b.001.png", "b.002.png"]
    vae = model(checkpoints)
    for name in ("a", "b.001", "b.002"):
        mean = whole(vae, read_clip(images / f"{name}.png", (16, 24))).mean
        assert close(Latents(tmp_path / "latents" / name).read(), mean)
        decoded = to_uint8(nnx.jit(CausalVideoVAE.decode)(vae, mean))[0]
        assert np.abs(read_clip(tmp_path / "again" / f"{name}.png").astype(int) - decoded).max() <= 1


def test_what_is_done_of_a_folder_is_left_out_and_what_was_begun_is_done(run, checkpoints, images, tmp_path, power):
    args = "encode", images, tmp_path / "latents", "--weights", checkpoints / "vae", "--resume"
    with power.fails(tmp_path / "latents", 30) as failed:
        run(*args)
    assert failed
    begun = sorted(path.name for path in (tmp_path / "latents").iterdir())
    assert begun != ["a", "b.001", "b.002"]
    code, _, err = run(*args)
    assert code == 0
    assert "of 3 are there already" in err
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == ["a", "b.001", "b.002"]
    code, _, err = run(*args)
    assert code == 0
    assert "3 of 3 are there already" in err


def test_two_images_of_one_name_are_refused_before_any_work(run, checkpoints, images, tmp_path):
    (images / "a.jpg").write_text("no image")
    code, _, err = run("encode", images, tmp_path / "latents", "--weights", checkpoints / "vae")
    assert code == 2
    assert "several files would be named a;" in err
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_a_folder_is_not_written_into_itself_nor_into_a_file(run, checkpoints, images, contents, command):
    before = contents(images)
    for target, message in ((images, "is the folder that is read"), (images / "notes.txt", "is a file; give a folder")):
        code, _, err = run(command, images, target, "--weights", checkpoints / "vae")
        assert code == 2
        assert message in err
        assert contents(images) == before
    code, _, err = run(command, images, images / "no" / "out", "--weights", checkpoints / "vae")
    assert code == 2
    assert "there is no folder" in err


@pytest.mark.slow
def test_frame_by_frame_gives_the_same_and_bfloat16_about_the_same(run, checkpoints, clip, tmp_path):
    def encoded(*more):
        target = tmp_path / f"latents{len(list(tmp_path.iterdir()))}"
        args = "--weights", checkpoints / "vae", "--frames", 17
        assert run("encode", clip, target, *args, *more)[0] == 0
        return Latents(target).read()

    plain, by_frame, rounded = encoded(), encoded("--frame-by-frame"), encoded("--precision", "bfloat16")
    assert close(by_frame, plain)
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(rounded - plain).max() / np.abs(plain).max() < 0.1
    code, _, err = run("decode", tmp_path / "latents0", tmp_path / "again.mkv", "--weights", checkpoints / "vae",
        "--frame-by-frame", "--precision", "bfloat16")  # fmt: skip
    assert code == 0
    assert "or from another precision" in err


def test_frame_by_frame_cannot_be_divided_in_time(run, checkpoints, clip, tmp_path):
    weights = "--weights", checkpoints / "vae"
    code, _, err = run("encode", clip, tmp_path / "out", *weights, "--mesh", "time=8", "--frame-by-frame")
    assert code == 2
    assert "--frame-by-frame computes one after the other what --mesh time=8 divides: take time=1" in err


@pytest.mark.slow
def test_lossy_tiles_change_frames_larger_than_a_tile(run, checkpoints, tmp_path):
    from flax_vae.io.video_writer import write_image

    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (264, 264, 3), dtype=np.uint8))
    args = "--weights", checkpoints / "vae"
    for name, more in (("plain", ()), ("tiles", ("--lossy-tiles",))):
        assert run("encode", tmp_path / "a.png", tmp_path / name, *args, "--size", 264, *more)[0] == 0
    plain, tiles = (Latents(tmp_path / name).read() for name in ("plain", "tiles"))
    assert plain.shape == tiles.shape == (1, 1, 33, 33, 16)
    assert not close(plain, tiles)
    assert run("decode", tmp_path / "tiles", tmp_path / "again.png", *args, "--lossy-tiles")[0] == 0


def test_memory_does_not_grow_with_the_length_of_a_clip(run, checkpoints, pixels, tmp_path, small_pieces):
    """Reads clips of 40 and of 400 frames in chunks, writes their pieces, and counts the bytes that numpy holds."""
    import functools
    import tracemalloc

    from flax_vae.io.latents import About
    from flax_vae.io.video_writer import VideoWriter
    from flax_vae.jobs.clip import open_clip
    from flax_vae.jobs.encode import write_piece
    from flax_vae.jobs.job import Job
    from flax_vae.jobs.model import read_config
    from flax_vae.jobs.pieces import run as run_pieces
    from flax_vae.jobs.screen import Meter

    def step(chunk, carry):
        moments = np.zeros((1, -(-chunk.shape[1] // 8), 2, 3, 16), np.float32)
        return SimpleNamespace(mean=moments, logvar=moments), (moments,)

    peaks = []
    for frames in (40, 400):
        path = tmp_path / f"{frames}.mkv"
        with VideoWriter(path, 25, 18, 25, lossless=True) as writer:
            for number in range(frames):
                writer.write(pixels[number % 19])
        opened = open_clip(path, read_config(str(checkpoints / "vae")), None, None)
        about = About(16, 24, opened.fps, "c", "w")
        tracemalloc.start()
        with Job(tmp_path / f"latents{frames}", {}, False) as job:
            run_pieces(job, step, opened.chunks(1), functools.partial(write_piece, job, about), Meter())
            job.become()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert Latents(tmp_path / f"latents{frames}").frames == frames
    assert peaks[1] < 1.2 * peaks[0] + 100_000
