"""Training runs: they go on to the same numbers whatever stops them, and fail with a word of what to do."""

import dataclasses
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

pytest.importorskip("av", reason="clips need PyAV")
pytest.importorskip("grain", reason="batches need grain")
pytest.importorskip("orbax", reason="checkpoints need orbax")
pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from flax_vae import CausalVideoVAE
from flax_vae.cli.export import export
from flax_vae.cli.train import with_preset
from flax_vae.io.port import torch_layout
from flax_vae.layers.conv import INIT_STD
from flax_vae.train import loop
from flax_vae.train.averaged import averaged
from flax_vae.train.checkpoints import CHECKPOINTS, UNKNOWN_QUALITY, Checkpoints, qualities_in, restore_part
from flax_vae.train.config import PRESETS, ClipConfig, TrainConfig
from flax_vae.train.data import batches
from flax_vae.train.discriminator import PatchDiscriminator
from flax_vae.train.log import MetricsLog
from flax_vae.train.loop import BROKEN, Run, check_config
from flax_vae.train.step import Trainer, TrainState
from tests.little import ONE_BLOCK
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SPEED = ("seconds", "frames_per_second", "waited")


@pytest.fixture(autouse=True, scope="module")
def promoting():
    """Lets optax and orbax promote as they do."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Has all runs take one trainer, which holds nothing that changes, and costs most of their time."""
    monkeypatch.setattr(loop, "Trainer", lambda config, *_, **__: trainer_of(config))


def trainer_of(config):
    """Returns a trainer, one for all runs that differ in what the loop alone asks for."""
    return trainer(replace(config, steps=22, save_every=1, picture_every=1, clips=ClipConfig()))


@functools.cache
def trainer(config):
    return Trainer(config, loop.first_model(config))


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A checkpoint of the smallest model, which compiles fast."""
    folder = tmp_path_factory.mktemp("init")
    CausalVideoVAE(ONE_BLOCK, rngs=nnx.Rngs(0)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two clips that move and an image."""
    from flax_vae.io.video_writer import VideoWriter, write_image

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(2):
        picture = rng.integers(0, 256, (24, 32, 3), np.uint8)
        with VideoWriter(folder / f"{number}.mp4", 25, 24, 32) as writer:
            writer.write(np.stack([np.roll(picture, i, axis=1) for i in range(12)]))
    write_image(folder / "image.png", picture)
    return folder


@pytest.fixture
def config(init):
    """Six steps on clips of 9 frames, 16 x 16, with all terms that need no weights."""
    tiny = PRESETS["tiny"]
    clips = replace(tiny.clips, size=16, batch=1, image_batch=2, images=0.0)
    optimizer = replace(tiny.optimizer, kind="adamw", warmup=2)
    return replace(tiny, init=init, steps=6, save_every=2, picture_every=3, keep=2, clips=clips, optimizer=optimizer)


def trained(config: TrainConfig, data: Path, out: Path, stop: int | None = None):
    """Trains, at most until `stop` steps are done; returns the state."""
    with Run(config, data, out) as run:
        for record in run.steps():
            if record.step + 1 == stop:
                break
        return run.state


def kernels(config: TrainConfig) -> list[np.ndarray]:
    """Returns the kernels, of at least 2,000 weights, that a run starts from."""
    weights = leaves(nnx.state(loop.first_model(config), nnx.Param))
    return [weight for weight in weights if weight.ndim > 1 and weight.size >= 2000]


@pytest.mark.parametrize("init_std", [0.02, 0.1, None])
def test_first_kernels_have_the_standard_deviation_that_is_asked_for(init_std):
    found = kernels(replace(PRESETS["tiny"], init_std=init_std))
    expected = [init_std or np.prod(kernel.shape[:-1]) ** -0.5 for kernel in found]
    np.testing.assert_allclose([kernel.std() for kernel in found], expected, rtol=0.08)
    assert TrainConfig().init_std == INIT_STD == 0.02  # of the public recipe


def lines(out: Path) -> list[dict]:
    values = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in values]


def leaves(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config, data, tmp_path):
    config = replace(config, clips=replace(config.clips, images=0.3))
    whole = trained(config, data, tmp_path / "whole")
    for stop in (3, 4, 6):  # one step after a save, at a save that is not made yet, and at the end
        trained(config, data, tmp_path / "stopped", stop)
    stopped = trained(config, data, tmp_path / "stopped")
    assert [line["step"] for line in lines(tmp_path / "whole")] == list(range(6))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    for one, other in zip(leaves(stopped), leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    kept = sorted(int(path.name) for path in (tmp_path / "whole" / CHECKPOINTS).iterdir())
    assert kept[-2:] == [4, 6]
    assert sorted(path.name for path in (tmp_path / "whole" / "pictures").glob("*.png")) == [
        "00000000.png",
        "00000003.png",
        "00000006.png",
    ]


def test_a_run_goes_on_from_its_last_save_to_the_same_numbers(config, data, tmp_path):
    whole = trained(config, data, tmp_path / "whole", stop=5)
    trained(config, data, tmp_path / "stopped", stop=4)  # logged, but not saved
    stopped = trained(config, data, tmp_path / "stopped", stop=5)
    assert [line["step"] for line in lines(tmp_path / "stopped")] == list(range(5))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    for one, other in zip(leaves(stopped), leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_process_reads_its_clips_of_the_batches_that_are_left(config, data, tmp_path, monkeypatch):
    with Run(config, data, tmp_path / "run") as run:
        run.share, run.state = (1, 2), replace(run.state, step=jnp.int32(3))
        monkeypatch.setattr(loop, "batches", read := mock.Mock(side_effect=InterruptedError))
        with pytest.raises(InterruptedError):
            next(run.steps())
    assert inspect.signature(batches).bind(*read.call_args.args, **read.call_args.kwargs).arguments == {
        "entries": run.entries,
        "config": config.clips,
        "seed": config.seed,
        "start": 3,
        "broken": tmp_path / "run" / BROKEN,
        "share": (1, 2),
    }


def test_the_discriminator_takes_part_from_its_step_on(config, data, tmp_path):
    with Run(replace(config, save_every=100, picture_every=100), data, tmp_path / "run") as run:
        run.config = replace(run.config, gan=replace(run.config.gan, kind="frames", start=2))
        run.trainer = mock.Mock()
        run.trainer.step = mock.Mock(
            side_effect=lambda state, *_, **__: (replace(state, step=state.step + 1), {"skipped": 0})
        )
        for record in run.steps():
            if record.step == 3:
                break
    assert [call.kwargs["with_gan"] for call in run.trainer.step.call_args_list] == [False, False, True, True]


def test_pictures_and_their_quality_are_of_the_averaged_weights(config, data, tmp_path):
    with Run(config, data, tmp_path / "run") as run:
        before, nothing = run.draw(), jax.tree.map(jnp.zeros_like, run.state.parameters)
        run.state = replace(run.state, parameters=nothing)
        assert run.draw() == before
        run.state = replace(run.state, ema=nothing)
        assert run.draw() != before


def test_a_checkpoint_holds_every_field_and_the_newest_and_the_best_are_kept(tmp_path):
    def state(first):
        fields = enumerate(dataclasses.fields(TrainState), first)
        values: Any = {field.name: {"kernel": jnp.arange(3) + 10 * number} for number, field in fields}
        return TrainState(**values)

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, quality in enumerate((20.0, 30.0, 25.0, UNKNOWN_QUALITY, 10.0)):
        checkpoints.save(step, state(step), quality)
        checkpoints.wait()
        assert qualities_in(tmp_path / "checkpoints")[step] == quality
    assert list(qualities_in(tmp_path / "checkpoints")) == [1, 3, 4]
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state(0)))
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state(4))
    assert all(map(np.array_equal, leaves(restored), leaves(state(4))))
    part, step = restore_part(tmp_path / "checkpoints", {"ema": state(0).ema}, "best")
    assert step == 1
    np.testing.assert_array_equal(part["ema"]["kernel"], state(1).ema["kernel"])


def test_weights_of_a_run_are_its_ema(config, data, tmp_path):
    state = trained(config, data, tmp_path / "run")
    vae, step = averaged(tmp_path / "run")
    assert step == 6
    pairs = zip(leaves(nnx.state(vae, nnx.Param)), leaves(state.ema), leaves(state.parameters), strict=True)
    for exported, ema, last in pairs:
        np.testing.assert_array_equal(exported, ema)
        assert not np.array_equal(ema, last)
    pictures = [json.loads(path.read_text()) for path in (tmp_path / "run" / "pictures" / "frames").glob("*.json")]
    assert averaged(tmp_path / "run", "best")[1] == max(pictures, key=lambda picture: picture["psnr"])["step"]
    with pytest.raises(FileNotFoundError, match="has no checkpoint 1, but"):
        averaged(tmp_path / "run", 1)
    with pytest.raises(FileNotFoundError, match="no folder of a training run"):
        averaged(tmp_path)


def test_export_writes_the_ema_in_the_public_layout(config, data, tmp_path, monkeypatch):
    trained(config, data, tmp_path / "run", stop=4)
    export(tmp_path / "run", tmp_path / "vae", step=2)
    expected, step = averaged(tmp_path / "run", 2)
    assert step == 2
    written = CausalVideoVAE.from_pretrained(tmp_path / "vae")
    assert written.config == expected.config
    for ours, theirs in zip(leaves(nnx.state(written)), leaves(nnx.state(expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="give --overwrite"):
        export(tmp_path / "run", tmp_path / "vae")
    export(tmp_path / "run", tmp_path / "vae", dtype="bfloat16", overwrite=True)
    assert CausalVideoVAE.from_pretrained(tmp_path / "vae", dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("words", [["--preset", "stage2"], ["--steps", "3", "--preset=stage2"]])
def test_a_preset_decides_the_defaults(words):
    defaults = inspect.signature(with_preset(words)).parameters
    assert (defaults["preset"].default, defaults["config"].default) == ("stage2", PRESETS["stage2"])
    assert inspect.signature(with_preset([])).parameters["config"].default == PRESETS["tiny"]


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(0, {"mse": float("nan"), "total": 2.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "mse": null, "total": 2.0}\n'


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard is written where tensorboardX is installed")
    log = MetricsLog(tmp_path, 0)
    log.add(0, {"mse": 2.0})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"mse" in events.read_bytes()


def test_a_discriminator_can_start_from_a_checkpoint(config, data, tmp_path, monkeypatch):
    given = PatchDiscriminator((4, 6), rngs=nnx.Rngs(0))
    save_file(
        {f"loss.discriminator.{key}": value for key, value in torch_layout(given).items()}, tmp_path / "gan.safetensors"
    )
    monkeypatch.setattr(loop, "Trainer", taken := mock.Mock(side_effect=InterruptedError))
    gan = replace(config.gan, kind="frames", init=str(tmp_path / "gan.safetensors"))
    with pytest.raises(InterruptedError):
        trained(replace(config, gan=gan), data, tmp_path / "run")
    discriminator = taken.call_args.args[3]
    for ours, theirs in zip(leaves(nnx.state(discriminator)), leaves(nnx.state(given)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_folder_keeps_to_its_config(config, data, tmp_path):
    trained(config, data, tmp_path / "run", stop=1)
    with pytest.raises(ValueError, match=r"another config \(seed was 0, now 1\)"):
        trained(replace(config, seed=1), data, tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "was"),
    [("pyramid-flow", "full"), ("pyramid-flow-small", "small"), ("pyramid-flow-tiny", "tiny")],
)
def test_a_config_of_an_earlier_version_is_read_in_the_names_of_today(model, was, tmp_path):
    settings = dataclasses.asdict(replace(PRESETS["stage2"], model=model))
    before = {{"init_std": "spread"}.get(name, name): value for name, value in settings.items()} | {"model": was}
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert "init_std" not in before
    check_config(tmp_path / "config.json", settings)
    (tmp_path / "config.json").write_text(json.dumps(before | {"spread": 0.5}))
    with pytest.raises(ValueError, match=r"another config \(init_std was 0.5, now 0.02\)"):
        check_config(tmp_path / "config.json", settings)


def test_a_run_of_an_earlier_version_goes_on_and_keeps_its_config(config, data, tmp_path):
    out, path = tmp_path / "run", tmp_path / "run" / "config.json"
    trained(config, data, out, stop=2)
    text = path.read_text()
    path.write_text(text.replace('"init_std"', '"spread"').replace('"pyramid-flow-tiny"', '"tiny"'))
    assert path.read_text() != text
    begun_before = path.read_text()
    assert int(trained(config, data, out, stop=3).step) == 3
    assert path.read_text() == begun_before


def test_two_runs_in_one_folder_are_refused(config, data, tmp_path):
    with Run(config, data, tmp_path / "run"), pytest.raises(ValueError, match="another process trains here"):
        trained(config, data, tmp_path / "run")


def test_data_that_cannot_be_read_is_an_error_at_once(config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"64 clips in a row cannot be read; the last one: .*text\.mp4"):
        trained(config, tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_clip_that_is_cut_short_is_replaced_and_listed(config, data, tmp_path):
    (tmp_path / "data").mkdir()
    for path in data.iterdir():
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "data" / "cut.mp4"
    cut.write_bytes((data / "0.mp4").read_bytes()[:1500])
    for _ in range(2):  # a second process notes nothing twice
        trained(config, tmp_path / "data", tmp_path / "run", stop=5)
    (line,) = (tmp_path / "run" / "broken.jsonl").read_text().splitlines()
    assert json.loads(line)["video"] == str(cut)
    assert "error" in json.loads(line)


@pytest.fixture
def longer(config):
    """More steps, with no save between the first and the last."""
    return replace(config, steps=22, save_every=100, picture_every=100)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(longer, data, tmp_path, monkeypatch):
    def poisoned(*args, **kwargs):
        for step, batch in enumerate(batches(*args, **kwargs)):
            clips = batch.astype(np.float32) / 127.5 - 1
            clips[0, 0, 0, 0, 0] = np.nan if step == 2 else 0
            yield clips

    with Run(longer, data, tmp_path / "run") as run:
        monkeypatch.setattr(loop, "batches", poisoned)
        assert [record.metrics["skipped"] for record in islice(run.steps(), 6)] == [0, 0, 1, 0, 0, 0]
        assert all(np.isfinite(leaf).all() for leaf in leaves(run.state))


def leaves_out(monkeypatch, steps):
    """Has trainers leave these steps out, as they do where something is not finite, and add 1 to weights in others."""

    def step(_, state, frames, *, with_gan):
        is_left_out = int(state.step) in steps
        skipped = state.skipped + 1 if is_left_out else jnp.zeros_like(state.skipped)
        weights = state.parameters if is_left_out else jax.tree.map(lambda weight: weight + 1, state.parameters)
        return replace(state, step=state.step + 1, parameters=weights, skipped=skipped), {"skipped": skipped}

    monkeypatch.setattr(Trainer, "step", step)


def test_several_such_steps_send_the_run_back_to_its_checkpoint(longer, data, tmp_path, monkeypatch, caplog):
    leaves_out(monkeypatch, {1, 2, 3, 4, 5})
    state = trained(longer, data, tmp_path / "run", stop=8)
    assert "5 steps in a row were not finite; going back to the weights of step 0" in caplog.text
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 0, 0]
    for now, first in zip(leaves(state.parameters), leaves(trainer_of(longer).start().parameters), strict=True):
        np.testing.assert_array_equal(now, first + 1 + 1)  # of the two steps since
    assert int(state.step) == 8


def test_a_run_that_never_gets_finite_again_ends(longer, data, tmp_path, monkeypatch):
    leaves_out(monkeypatch, range(1, 100))
    with pytest.raises(ValueError, match="losses are not finite; lower the learning rate"):
        trained(longer, data, tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 21


def test_all_that_a_config_cannot_have_is_listed(config, data, tmp_path):
    clips = replace(config.clips, frames=8, size=20)
    with pytest.raises(ValueError, match=r"clips\.frames is 8, expected 8k \+ 1; clips\.size is 20") as caught:
        Run(replace(config, init=None, clips=clips, steps=0), data, tmp_path / "run")
    assert "steps is 0, expected at least 1" in str(caught.value)
    clips = replace(clips, size=21)  # a latent of the model that this config starts from spans 2 frames and 2x2 pixels
    with pytest.raises(ValueError, match=r"clips\.frames is 8, expected 2k \+ 1; clips\.size is 21"):
        Run(replace(config, clips=clips), data, tmp_path / "run")
    with pytest.raises(ValueError, match="expected kind frames where it has an init"):
        Run(replace(config, gan=replace(config.gan, kind="causal", init="gan.pt")), data, tmp_path / "run")
    with pytest.raises(ValueError, match="lies in the data"):
        Run(config, data, data / "run")


def command(config: TrainConfig, data: Path, out: Path, *more: str) -> list[str]:
    words = ["--data", data, "--out", out, "--init", config.init, "--steps", config.steps, "--save-every", 1]
    words += ["--picture-every", 100, "--clips.size", 16, "--clips.batch", 1, "--clips.image-batch", 2, *more]
    return [sys.executable, "-m", "flax_vae", "train", *map(str, words)]


def begun(words: list[str], out: Path, steps: int, **kwargs) -> subprocess.Popen:
    """Starts a training process and waits until it has done some steps."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache")}  # not the suite's: it may be killed
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env, **kwargs)
    metrics, patience = out / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < patience
        time.sleep(0.01)
    return process


def stopped(process: subprocess.Popen) -> str:
    """Sends SIGTERM, waits until the process ends as it should; returns its messages."""
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(config, data, tmp_path):
    config = replace(config, steps=100_000)
    process = begun(command(config, data, tmp_path / "run"), tmp_path / "run", 3)
    said = stopped(process)
    assert "saved; the same command goes on" in said
    done = len(lines(tmp_path / "run"))
    assert averaged(tmp_path / "run")[1] == done


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(config, data, tmp_path):
    config = replace(config, steps=40)
    subprocess.run(command(config, data, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    words, rng = command(config, data, tmp_path / "run"), np.random.default_rng(0)
    for _ in range(4):
        done = len(lines(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0
        process = begun(words, tmp_path / "run", min(done + 3, 40))
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_disk_that_fills_during_a_save_leaves_the_checkpoints_before(config, data, tmp_path):
    out = tmp_path / "run"
    words = command(replace(config, steps=100_000), data, out)
    stopped(begun(words, out, 2))
    before, metrics = averaged(out)[1], lines(out)
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "-", *words]  # no file larger than 64 KiB
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    failed = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, env=env)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "a checkpoint could not be written; those before it are whole" in failed.stderr.splitlines()[-1]
    assert averaged(out)[1] == before
    assert lines(out)[:before] == metrics
