"""What every test runs under: the CPU unless told otherwise, nothing promoted in silence, signatures checked."""

import contextlib
import functools
import os
import signal
import sys
from importlib.util import find_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

if find_spec("beartype"):
    # Not config and posterior: a file fills the one's fields with anything, a tree map the other's.
    models = [f"flax_vae.models.{name}" for name in ("encoder", "decoder", "scaling", "vae")]
    jaxtyping.install_import_hook(["flax_vae.layers", "flax_vae.runtime", *models], "beartype.beartype")
if find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("fixed")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error:::(flax_vae|test_)")
    config.addinivalue_line("filterwarnings", "ignore:.*deprecated by PEP 585")  # beartype, about flax's nnx.List


@pytest.fixture(autouse=True, scope="module")
def strict():
    """Makes an array of another dtype or rank an error where it would be promoted."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
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
    """Gives a function that compiles `function(module, *args)` for one module, fast, to code that is slow but equal."""
    return compile_fast


def compile_fast(function, module):
    graph, state = nnx.split(module)
    options = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda state, *args: function(nnx.merge(graph, state), *args), compiler_options=options)
    return functools.partial(run, state)


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
        return is_relative or (isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder))


@pytest.fixture
def python_signals():
    """Has signals handled as Python does by itself, for one test: a suite started in the background ignores SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
