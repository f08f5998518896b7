"""The contract holds: a family of forty lines goes through everything, and no other file knows of it."""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from flax_vae.families import registry
from flax_vae.runtime import sharded, stream
from flax_vae.runtime.mesh import make_mesh
from flax_vae.train.config import ClipConfig, GanConfig, LossConfig, TrainConfig
from flax_vae.train.discriminator import PatchDiscriminator
from flax_vae.train.step import Trainer
from tests.families.toy import ToyVAE, ToyVAEConfig


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Adds the line that a new family adds to the registry."""
    monkeypatch.setitem(registry.FAMILIES, "ToyVAE", ToyVAE)


@pytest.fixture(scope="module")
def vae(randomized):
    return randomized(lambda rngs: ToyVAE(ToyVAEConfig(), rngs=rngs))


@pytest.fixture
def checkpoint(vae, tmp_path):
    vae.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def relative(actual, expected):
    """Returns the largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max())


def test_checkpoint_has_its_names_and_finds_its_class(vae, checkpoint):
    names = {"encoder/down/conv/weight", "encoder/down/conv/bias", "decoder/later/conv/conv/weight"}
    assert names <= set(load_file(checkpoint / "diffusion_pytorch_model.safetensors"))
    assert json.loads((checkpoint / "config.json").read_text()) == {"z_dim": 2, "_class_name": "ToyVAE"}
    loaded = registry.from_pretrained(checkpoint.parent, "toy")
    assert type(loaded) is ToyVAE
    pairs = zip(*(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (loaded, vae)), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


def test_streams_and_chunks_give_the_whole_clip(vae, noise):
    clip = noise((1, 9, 8, 6, 3))
    whole = vae.encode(clip)
    chunks = list(stream.encode(vae, [clip[:, :3], clip[:, 3:5], clip[:, 5:]]))
    assert relative(jnp.concatenate([chunk.mean for chunk in chunks], axis=1), whole.mean) < 1e-6
    assert relative(vae.encode(clip, chunk=2).mean, whole.mean) < 1e-6
    frames = list(stream.decode(vae, [whole.mean[:, :2], whole.mean[:, 2:]]))
    assert relative(jnp.concatenate(frames, axis=1), vae.decode(whole.mean)) < 1e-6


def test_eight_devices_give_what_one_gives(vae, noise):
    clip, mesh = noise((2, 9, 8, 6, 3)), make_mesh({"data": 2, "time": 2, "height": 2})
    latents = sharded.encode(vae, clip, mesh).mean
    assert relative(latents, vae.encode(clip).mean) < 1e-6
    assert relative(sharded.decode(vae, latents, mesh), vae.decode(latents)) < 1e-6


def test_scaling_is_the_one_that_was_released(vae, noise):
    latents = noise((1, 3, 2, 2, 2))
    np.testing.assert_allclose(vae.scaling.normalize(latents)[:, 0], (latents[:, 0] - 0.5) * 2, rtol=1e-6)


def test_a_step_of_training_with_a_discriminator_moves_the_last_kernel(vae):
    config = TrainConfig(
        model="toy",
        precision="float32",
        clips=ClipConfig(frames=3, size=32, batch=1, images=0.0),
        loss=LossConfig(lpips=0.0),
        gan=GanConfig(kind="frames"),
    )
    trainer = Trainer(config, vae, discriminator=PatchDiscriminator((2, 2, 2), rngs=nnx.Rngs(0)))
    frames = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32, 3)).astype(np.uint8)
    before = np.array(trainer.start().parameters["decoder"]["larger"]["conv"]["conv"]["kernel"][...])
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = trainer.step(trainer.start(), frames, with_gan=True)
    assert float(metrics["gan_weight"]) > 0
    assert not np.array_equal(before, state.parameters["decoder"]["larger"]["conv"]["conv"]["kernel"][...])


def test_every_command_takes_it(checkpoint, run, tmp_path):
    pytest.importorskip("av", reason="video files need PyAV")
    from flax_vae.io.video_reader import read_clip
    from flax_vae.io.video_writer import VideoWriter

    frames = np.random.default_rng(1).integers(0, 256, (4, 16, 18, 3)).astype(np.uint8)
    with VideoWriter(tmp_path / "clip.mkv", Fraction(25), 16, 18, lossless=True) as writer:
        writer.write(frames)
    code, output, _ = run("info", checkpoint, "--size", "16x18", "--frames", "4")
    assert (code, "z_dim" in output, "3 x 8 x 9 x 2" in output) == (0, True, True)
    assert run("encode", tmp_path / "clip.mkv", tmp_path / "latents", "--weights", checkpoint)[0] == 0
    code, _, messages = run("decode", tmp_path / "latents", tmp_path / "again.mp4", "--weights", checkpoint)
    assert code == 0, messages
    assert read_clip(tmp_path / "again.mp4").shape == frames.shape
    assert run("port", checkpoint, tmp_path / "ported")[0] == 0
    code, _, messages = run("reconstruct", tmp_path / "clip.mkv", tmp_path / "out.mp4", "--weights", checkpoint)
    assert (code, "4 frames are not 2k + 1" in messages) == (0, True)
