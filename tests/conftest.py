"""What every test runs under: the CPU unless told otherwise, nothing promoted in silence, signatures checked."""

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec

from tests.resources import alone, bounded, compiled_fast, share  # noqa: F401

share()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for meshes; one is used otherwise

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from flax_vae.runtime.compiler_options import order_for_memory

order_for_memory()  # as the commands do
if find_spec("beartype"):
    # Not configs and the posterior: a file fills the fields of the ones with anything, a tree map those of the other.
    checked = ["flax_vae.ops", "flax_vae.layers", "flax_vae.models.latents", "flax_vae.models.vae", "flax_vae.runtime"]
    jaxtyping.install_import_hook(checked, "beartype.beartype")
if find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("fixed")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error:::(flax_vae|tests|test_)")
    config.addinivalue_line("filterwarnings", "ignore:.*deprecated by PEP 585")  # beartype, about flax's nnx.List


def pytest_collection_finish():
    """Leaves what is there before the first test, most of it imported, out of collections of garbage, made rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def strict():
    """Makes an array of another dtype or rank an error where it would be promoted."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def fast():
    """Compiles little programs, run once or twice, as fast as it can be done."""
    with compiled_fast():
        yield


@pytest.fixture(scope="module")
def float64():
    """Lets a whole module compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Switches the checks of signatures off, to hear what the code itself says to a wrong input."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def noise():
    """Gives a function of a shape and a seed: reproducible standard normal values, float64 where jax has it enabled."""
    return lambda shape, seed=0: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


@pytest.fixture(scope="session")
def randomized():
    """Gives a function that builds a module with every parameter random, biases and norm scales too."""
    return randomize


def randomize(build, seed=0):
    """Calls `build(rngs)` for the shapes alone, then draws parameters that keep the size of activations."""
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(around + rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.result_type(float))

    nnx.update(module, jax.tree_util.tree_map_with_path(draw, nnx.state(module, nnx.Param)))
    return module


@pytest.fixture(scope="session")
def jit():
    """Gives a function that compiles `function(module, *args)` for one module."""
    return compiled


def compiled(function, module):
    graph, state = nnx.split(module)
    return functools.partial(jax.jit(lambda state, *args: function(nnx.merge(graph, state), *args)), state)


@pytest.fixture(scope="session")
def stream():
    """Gives a function that runs a clip through `step(chunk, carry)` in chunks of the given lengths."""
    return run_chunks


def run_chunks(step, x, plan, tamper=lambda carry: carry):
    """Returns all outputs, joined in time, and the last carry; `tamper` changes the carry between chunks."""
    carry, outputs, start = None, [], 0
    for frames in plan:
        y, carry = step(x[:, start : start + frames], carry if carry is None else tamper(carry))
        outputs.append(y)
        start += frames
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs), carry


@pytest.fixture(scope="session")
def power():
    """Gives what lets the power fail: `with power.fails(folder, after):` stops a process as kill -9 does."""
    return Power()


class PowerFailure(BaseException):
    """Nothing may be done after this one, least of all cleaning up."""


class Power:
    """Counts what is done to files in a folder, and lets nothing be done from a moment on."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

    def __init__(self):
        self._folder, self.changes, self._last, self._is_off = None, 0, None, False
        sys.addaudithook(self._watch)

    @contextlib.contextmanager
    def fails(self, folder, after=None):
        """Fails after so many changes, or never; `changes` counts them. Gives whether it has failed, as a list."""
        self._folder, self.changes, self._last, self._is_off = os.fspath(folder), 0, after, False
        failures = []
        try:
            yield failures
        except PowerFailure:
            failures.append(True)
        finally:
            self._folder = None

    def _watch(self, event, args):
        if self._folder is None or not self._is_change(event, args):
            return
        if self._is_off or self.changes == self._last:
            self._is_off = True
            raise PowerFailure
        self.changes += 1

    def _is_change(self, event, args):
        if event not in self.CHANGES and not (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return False
        path, is_relative = args[0], event in ("os.remove", "os.rmdir") and args[-1] != -1  # rmtree goes by descriptors
        return is_relative or (isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder or ""))


@pytest.fixture
def python_signals():
    """Has signals handled as Python does by itself, for one test: a suite started in the background ignores SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Holds `vae`, a checkpoint of random weights, `again` with other weights, and `other` with another config."""
    from flax_vae import CausalVideoVAE
    from flax_vae.io import checkpoint, port
    from tests.little import THREE_BLOCKS

    folder = tmp_path_factory.mktemp("checkpoints")
    other = replace(THREE_BLOCKS, encoder_block_out_channels=(4, 6, 6))
    for name, seed, config in (("vae", 1, THREE_BLOCKS), ("again", 2, THREE_BLOCKS), ("other", 1, other)):
        shapes = port.parameters(nnx.eval_shape(lambda config=config: CausalVideoVAE(config, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(seed)
        drawn = {key: (0.2 * rng.standard_normal(p.torch_shape)).astype(np.float32) for key, p in shapes.items()}
        checkpoint.save(folder / name, config.to_dict(), port.Arrays(drawn))
    return folder


@pytest.fixture(scope="session")
def pixels():
    """19 frames (T, H, W, 3) of an odd size, whose squares change in steps."""
    steps = np.random.default_rng(2).integers(-40, 40, (19, 3, 4, 3)).cumsum(axis=0) % 256
    return np.repeat(np.repeat(steps, 7, axis=1), 7, axis=2)[:, :18, :25].astype(np.uint8)


@pytest.fixture(scope="session")
def clip(pixels, tmp_path_factory):
    """These frames as a file, without loss."""
    pytest.importorskip("av", reason="video files need PyAV")
    from flax_vae.io.video_writer import VideoWriter

    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    with VideoWriter(path, Fraction(30000, 1001), 18, 25, lossless=True) as writer:
        writer.write(pixels)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command and gives its exit code, output and messages."""
    pytest.importorskip("tyro", reason="the command line needs tyro")
    pytest.importorskip("rich", reason="the command line needs rich")
    from flax_vae.cli import main

    monkeypatch.setattr("os._exit", sys.exit)

    def call(*args):
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in args])
        return exit.value.code, *capsys.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def small_pieces(monkeypatch):
    """Has a piece of every latent but the first, so that short clips have several, and chunks of one latent."""
    importlib.import_module("flax_vae.jobs.extract")  # before, as it keeps the number that it finds
    monkeypatch.setattr("flax_vae.jobs.pieces.PIECE_LATENTS", 1)
    monkeypatch.setattr("flax_vae.jobs.budget.MAX_CHUNK_LATENTS", 1)
    monkeypatch.setattr("flax_vae.jobs.job.MIN_WORK_PER_SAVE", 0)


@pytest.fixture(scope="session")
def contents():
    """Gives a function of a folder: every file in it, and what it holds."""
    return lambda folder: {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
