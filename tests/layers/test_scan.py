"""Chunks inside one program: values and gradients of the whole clip, for any length and any size of chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE
from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.resample import TemporalDownsample, TemporalUpsample
from flax_vae.layers.resnet import CausalResnetBlock
from flax_vae.layers.scan import scan_chunks
from flax_vae.layers.sequence import run_layers
from tests.compiled import memory
from tests.little import CONFIG, ONE_BLOCK

hypothesis = pytest.importorskip("hypothesis", reason="lengths and chunks are drawn by hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")

FACTOR = CONFIG.temporal_factor
TOLERANCE = {"float64": 1e-12, "float32": 16 * np.finfo(np.float32).eps}


class Chain(nnx.Module):
    """Time halved and doubled, and convolutions of other kernels and dilations, in little."""

    def __init__(self, *, rngs):
        self.layers = nnx.List(
            [
                CausalConv3d(2, 3, 3, rngs=rngs),
                TemporalDownsample(3, rngs=rngs),
                CausalConv3d(3, 3, (2, 1, 1), dilation=2, rngs=rngs),
                TemporalUpsample(3, 2, rngs=rngs),
            ]
        )

    def step(self, x, carry=None):
        return run_layers(self.layers, x, carry)


@pytest.fixture(scope="module")
def chain(randomized):
    return randomized(lambda rngs: Chain(rngs=rngs))


@pytest.fixture(scope="module")
def vae(randomized):
    return randomized(lambda rngs: CausalVideoVAE(CONFIG, rngs=rngs))


def cast(module, dtype):
    structure, state = nnx.split(module)
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def apart(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return float(np.abs(a - b).max() / np.abs(b).max())


@settings(max_examples=3)
@given(half=st.integers(0, 12), half_size=st.integers(1, 14), dtype=st.sampled_from(("float64", "float32")))
@hypothesis.example(half=12, half_size=1, dtype="float64")
@hypothesis.example(half=6, half_size=6, dtype="float64")
@hypothesis.example(half=3, half_size=7, dtype="float32")
def test_any_length_in_chunks_of_any_size_is_the_whole(chain, noise, half, half_size, dtype):
    x = noise((2, 2 * half + 1, 3, 2, 2), half).astype(dtype)
    chain = cast(chain, dtype)
    assert apart(scan_chunks(chain, Chain.step, x, 2 * half_size)[0], chain.step(x)[0]) < TOLERANCE[dtype]


def spoiled(spoil):
    """Gives a step that spoils the carry."""
    return lambda chain, x, carry: chain.step(x, None if carry is None else spoil(carry))


def stale(chain, x, carry):
    """A step that uses the carry of the chunk before the last."""
    older, newer = (None, None) if carry is None else carry
    y, after = chain.step(x, older)
    return y, (after if newer is None else newer, after)


def never_dropping(chain, x, carry):
    """A step that goes on from frames of zeros where a stream starts, and so drops no first frame."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(chain.step, x)[1])
    return chain.step(x, zeros if carry is None else carry)


def always_dropping(chain, x, carry):
    y, carry = chain.step(x, carry)
    return y[:, 1:], carry


ORDER, SWAPPED = range(9), (0, 1, 2, 5, 6, 3, 4, 7, 8)
MISTAKES = {
    "carry of zeros": (spoiled(lambda carry: jax.tree.map(jnp.zeros_like, carry)), ORDER),
    "carry of the chunk before": (stale, ORDER),
    "carry shifted by a frame": (spoiled(lambda carry: jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), carry)), ORDER),
    "first frame not dropped": (never_dropping, ORDER),
    "first frame of every chunk dropped": (always_dropping, ORDER),
    "chunks swapped": (Chain.step, SWAPPED),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(chain, noise, mistake):
    def check(step, order):
        assert apart(scan_chunks(chain, step, x[:, jnp.array(order)], 2)[0], chain.step(x)[0]) < TOLERANCE["float64"]

    x = noise((2, 9, 3, 2, 2))
    check(Chain.step, ORDER)
    with pytest.raises(AssertionError):
        check(*MISTAKES[mistake])


def coded(vae, x, chunk=None):
    """Gives the moments of a clip and what their mean decodes to, in chunks of so many frames."""
    posterior = vae.encode(x, chunk=chunk)
    video = vae.decode(posterior.mean, chunk=chunk and chunk // FACTOR)
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1), video


@pytest.fixture(scope="module")
def wholes(vae, noise, jit):
    """Returns a function of a precision: a model, a clip, its moments and what they decode to, as a whole."""

    @functools.cache
    def whole(dtype):
        model, x = cast(vae, dtype), noise((1, 17, 5, 6, 3)).astype(dtype)
        return model, x, *jit(coded, model)(x)

    return whole


@pytest.mark.parametrize(
    ("frames", "chunk", "dtype"),
    [
        pytest.param(1, 4, "float64", marks=pytest.mark.slow),
        pytest.param(9, 16, "float64", marks=pytest.mark.slow),
        pytest.param(17, 4, "float64", marks=pytest.mark.slow),
        pytest.param(13, 8, "float64", marks=pytest.mark.slow),
        pytest.param(17, 4, "float32", marks=pytest.mark.slow),
    ],
)
def test_a_clip_in_chunks_is_the_whole_clip_and_its_prefix_a_prefix(wholes, frames, chunk, dtype):
    vae, x, moments, video = wholes(dtype)
    some_moments, some_video = coded(vae, x[:, :frames], chunk)
    assert apart(some_moments, moments[:, : (frames - 1) // FACTOR + 1]) < TOLERANCE[dtype]
    assert apart(some_video, video[:, :frames]) < TOLERANCE[dtype]


@pytest.mark.slow
def test_gradients_through_chunks_are_those_of_the_whole_in_less_memory(randomized, noise):
    structure, parameters = nnx.split(randomized(lambda rngs: CausalVideoVAE(ONE_BLOCK, rngs=rngs)))

    def loss(parameters, x, chunk):
        vae = nnx.merge(structure, parameters)
        posterior = vae.encode(x, chunk=chunk)
        video = vae.decode(posterior.sample(jax.random.key(0)), chunk=chunk and chunk // 2)
        return jnp.square(video - x).mean() + 1e-2 * posterior.kl()

    x, results, taken = noise((1, 33, 12, 16, 3)), [], []
    for chunk in (None, 2):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
        program = step.lower(parameters, x, chunk).compile()
        results.append(jax.tree.leaves(program(parameters, x)))
        taken.append(memory(program).temp_size_in_bytes)
    sizes = [np.abs(leaf).max() for leaf in results[0]]
    assert (
        sum(size > 1e-6 * max(sizes) for size in sizes) == len(sizes) - 2
    )  # the biases of attention's keys do nothing
    for whole, chunked, size in zip(*results, sizes, strict=True):
        assert np.abs(chunked - whole).max() < 1e-12 * max(size, 1e-3 * max(sizes))
    assert taken[1] < 0.75 * taken[0]


def test_a_carry_is_all_that_is_kept_for_it(randomized):
    blocks = randomized(lambda rngs: nnx.List([CausalResnetBlock(8, num_groups=2, rngs=rngs) for _ in range(3)]))
    structure, parameters = nnx.split(blocks)

    def run(parameters, x):
        return run_layers(nnx.merge(structure, parameters), x)

    x = jax.ShapeDtypeStruct((1, 17, 32, 32, 8), "float64")
    with_carry, without = (
        memory(jax.jit(function).lower(parameters, x).compile()) for function in (run, lambda *args: run(*args)[0])
    )
    assert with_carry.output_size_in_bytes > without.output_size_in_bytes
    assert with_carry.temp_size_in_bytes < 1.05 * without.temp_size_in_bytes


@pytest.mark.slow
def test_frames_that_complete_no_latent_are_refused_or_padded_or_left_out_as_asked(vae, noise):
    x = noise((1, 7, 5, 6, 3))
    longer = jnp.concatenate([x, x[:, 6:], x[:, 6:]], axis=1)
    padded, trimmed = (vae.encode(x, chunk=4, extra_frames=policy).mean for policy in ("pad", "trim"))
    assert np.array_equal(padded, vae.encode(longer, chunk=4).mean)
    assert np.array_equal(trimmed, vae.encode(x[:, :5], chunk=4).mean)
    assert nnx.eval_shape(lambda vae, x: vae.encode(x, extra_frames="pad"), vae, x).mean.shape[1] == 3
    assert nnx.eval_shape(lambda vae, x: vae.encode(x, extra_frames="trim"), vae, x).mean.shape[1] == 2
    for chunk in (None, 4):
        with pytest.raises(ValueError, match=r"must have 4k \+ 1 frames, got 7; extra_frames='pad' repeats the last"):
            vae.encode(x, chunk=chunk)


@pytest.mark.parametrize("chunk", [0, -4, 6, 3])
def test_a_chunk_of_no_whole_latents_is_refused(vae, noise, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk}: expected a multiple of 4, at least 4"):
        vae.encode(noise((1, 9, 5, 6, 3)), chunk=chunk)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_latents_is_refused(vae, noise, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk}: expected at least 1 latent"):
        vae.decode(noise((1, 3, 3, 3, 2)), chunk=chunk)


def test_the_step_is_traced_for_the_first_chunk_and_for_all_later_ones_once_a_shape(chain, noise):
    traced = []

    def step(chain, x, carry):
        traced.append(x.shape[1])
        return chain.step(x, carry)

    for frames in (7, 7, 13):
        scan_chunks(chain, step, noise((1, frames, 3, 2, 2)), 4)
    assert traced == [3, 4, 1, 4]


class Dropping(nnx.Module):
    def __init__(self, *, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def step(self, x, carry=None):
        return self.dropout(x), ()


def test_random_state_moves_on_with_every_chunk_and_every_call():
    module, x = Dropping(rngs=nnx.Rngs(0)), jnp.ones((1, 5, 4, 4, 4))
    first, second = (scan_chunks(module, Dropping.step, x, 2)[0] for _ in range(2))
    frames = [frame for y in (first[:, ::2], second[:, ::2]) for frame in np.asarray(y).swapaxes(0, 1)]
    assert len({frame.tobytes() for frame in frames}) == 6
    assert {int(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.RngCount))} == {6}


def test_a_model_without_dropout_is_left_as_it_was(chain, noise):
    structure, state = nnx.split(chain)
    scan_chunks(chain, Chain.step, noise((1, 5, 3, 2, 2)), 2)
    after = nnx.split(chain)
    assert after[0] == structure
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (after[1], state)), strict=True))
