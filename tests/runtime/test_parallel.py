"""Clips on meshes of eight devices: the results, losses and gradients of one device, and what the devices exchange."""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from flax_vae import CausalVideoVAE, to_uint8
from flax_vae.families.pyramid import narrow
from flax_vae.layers import attention
from flax_vae.layers.sequence import Execution
from flax_vae.layers.time_halo import TimeHalo
from flax_vae.metrics.lpips import LPIPS
from flax_vae.models.posterior import DiagonalGaussian
from flax_vae.ops.lowering import convolve
from flax_vae.ops.window import Window
from flax_vae.planning.hlo import program
from flax_vae.runtime import parallel, sharded, stream
from flax_vae.runtime.mesh import make_mesh, parse_mesh
from flax_vae.train.checkpoints import Checkpoints
from flax_vae.train.config import ClipConfig, GanConfig, LossConfig, OptimizerConfig, TrainConfig
from flax_vae.train.discriminator import CausalPatchDiscriminator, PatchDiscriminator
from flax_vae.train.step import Trainer, sampled
from tests.compiled import text
from tests.little import CONFIG, ONE_BLOCK

pytestmark = pytest.mark.usefixtures("float64")
slow = pytest.mark.slow
MODEL = narrow((4, 8, 8, 8), groups=4, encoder_layers=1, decoder_layers=1)
TRAINING = TrainConfig(
    steps=20,
    precision="float32",
    clips=ClipConfig(size=32, batch=2, images=0.0),
    loss=LossConfig(lpips=0.0),
    gan=GanConfig("none"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=1, clip=1e9),
)
MIXED = "data=2,time=2,height=2"
MESHES = ["data=2", "time=2", "height=2", "width=4", "height=2,width=2", "time=2,width=2", MIXED]
TOLERANCE = 1e-10


@pytest.fixture(autouse=True, scope="module")
def promoting():
    """Lets optax promote as it does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def joined(parts):
    """Joins the parts of a clip, or trees of such, in time."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def mesh_of(text):
    sizes = parse_mesh(text)
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.fixture(scope="module")
def vae(randomized):
    return randomized(lambda rngs: CausalVideoVAE(MODEL, rngs=rngs))


@pytest.fixture(scope="module")
def clip(noise):
    return noise((2, 17, 32, 32, 3))


@pytest.fixture(scope="module")
def whole(vae, clip, jit):
    """Returns the posterior of the clip, and its latents decoded, on one device."""
    return coded(vae, clip, jit)


def coded(vae, clip, jit):
    encode, decode = (jit(function, vae) for function in (CausalVideoVAE.encode, CausalVideoVAE.decode))
    posterior = encode(clip)
    return posterior, decode(posterior.mean)


def apart(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())


def check_mesh(mesh, vae, clip, posterior, video):
    found = sharded.encode(vae, clip, mesh)
    assert apart(found.mean, posterior.mean) < TOLERANCE
    assert apart(found.logvar, posterior.logvar) < TOLERANCE
    assert apart(sharded.decode(vae, posterior.mean, mesh), video) < TOLERANCE


@slow
@pytest.mark.parametrize("text", MESHES)
def test_a_clip_on_a_mesh_is_that_of_one_device(vae, clip, whole, text):
    check_mesh(mesh_of(text), vae, clip, *whole)


def test_a_clip_on_a_mesh_of_three_axes_is_that_of_one_device(little, noise, jit):
    clip = noise((2, frames_of(5), 8, 6, 3))
    check_mesh(mesh_of(MIXED), little, clip, *coded(little, clip, jit))


@pytest.fixture(scope="module")
def little(randomized):
    """A model so small that it compiles fast for eight devices with a latent each."""
    return randomized(lambda rngs: CausalVideoVAE(ONE_BLOCK, rngs=rngs))


def frames_of(latents):
    return ONE_BLOCK.temporal_factor * (latents - 1) + 1


@pytest.fixture(scope="module")
def short_clip(noise):
    """Returns a function of a number of latents: the pixels of so many, the first of a longer clip."""
    return lambda latents: noise((2, frames_of(17), 4, 6, 3))[:, : frames_of(latents)]


@pytest.fixture
def carried(monkeypatch):
    """Lists, for every carry that is gone on from, its frames and those that a device holds."""
    before, found = TimeHalo.before, []

    def noted(self, x):
        found.append((self.carry.shape[1], x.shape[1]))
        return before(self, x)

    monkeypatch.setattr(TimeHalo, "before", noted)
    return found


def run_and_gradients(vae, step, clip, mesh, jit):
    """Returns by name what a step makes of a clip, and the gradients of a loss by parameters and clip."""

    def loss(state, parts, structure):
        with parallel.lowered_for(mesh):
            results = parallel.run_parts(nnx.merge(structure, state), step, parts, mesh)
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(results)), results

    def run(vae, parts):
        structure, state = nnx.split(vae)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(state, parts, structure)

    parts = (clip,) if mesh is None else parallel.shard(clip, mesh)
    (total, results), (by_parameters, by_clip) = jit(run, vae)(parts)
    found = {"loss": total, "result": joined(results), "gradient by clip": joined(by_clip), "gradients": by_parameters}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(jax.device_get(found))}


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("way", [pytest.param("encode", marks=slow), "decode"])
def test_a_clip_of_one_latent_a_device_and_its_gradients_are_those_of_one_device(
    little, short_clip, noise, jit, carried, devices, way
):
    clip = short_clip(1 + devices) if way == "encode" else noise((2, 1 + devices, 2, 3, 2))
    step = getattr(CausalVideoVAE, f"{way}_chunk")
    expected, found = (run_and_gradients(little, step, clip, mesh, jit) for mesh in (None, mesh_of(f"time={devices}")))
    assert (2, 1) in carried  # two frames, which come from two devices
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        scale = np.abs(value).max()  # of keys' biases it is all rounding
        assert np.abs(found[name] - value).max() <= TOLERANCE * (scale if scale > 1e-9 * largest else largest), name


@pytest.fixture(scope="module")
def short_whole(little, short_clip, jit):
    """Means of 17 latents, and the video that they are decoded to, on one device."""
    means = jit(CausalVideoVAE.encode, little)(short_clip(17)).mean
    return np.asarray(means), np.asarray(jit(CausalVideoVAE.decode, little)(means))


@pytest.mark.parametrize("devices", [4, 8])
def test_a_stream_of_one_latent_a_device_goes_on_from_its_carry_as_on_one_device(
    little, short_clip, short_whole, carried, devices
):
    mesh, ends = mesh_of(f"time={devices}"), (0, 1, 1 + devices, 1 + 2 * devices)
    clip, (means, video) = np.asarray(short_clip(ends[-1])), short_whole
    for start, x, expected, length, length_out in (
        (stream.encode, clip, means, frames_of, int),
        (stream.decode, means, video, int, frames_of),
    ):
        bounds = [length(latents) if latents else 0 for latents in ends]
        first, second, third = (x[:, a:b] for a, b in itertools.pairwise(bounds))
        carried.clear()
        begun = start(little, [first, second], mesh=mesh)
        results = list(begun)
        results += start(little, [third], jax.tree.map(np.asarray, begun.carry), mesh=mesh)
        assert (2, 1) in carried
        results = [result.mean if start is stream.encode else result for result in results]
        assert apart(np.concatenate(results, axis=1), expected[:, : length_out(ends[-1])]) <= TOLERANCE


@slow
@pytest.mark.parametrize("text", ["height=2", "time=2,width=2"])
def test_a_stream_on_a_mesh_is_that_of_one_device_and_goes_on_without_it(vae, noise, text):
    x = np.asarray(noise((1, 33, 32, 32, 3)))
    whole = np.asarray(vae.encode(jnp.asarray(x)).mean)
    chunks, mesh = (x[:, :1], x[:, 1:17], x[:, 17:]), mesh_of(text)
    encoding = stream.encode(vae, chunks[:2], mesh=mesh)
    parts = [posterior.mean for posterior in encoding]
    carry = jax.tree.map(np.asarray, encoding.carry)
    for rest in (stream.encode(vae, chunks[2:], carry, mesh=mesh), stream.encode(vae, chunks[2:], carry)):
        assert apart(np.concatenate([*parts, next(rest).mean], axis=1), whole) < TOLERANCE
    decoding = stream.decode(vae, (whole[:, :1], whole[:, 1:3], whole[:, 3:]), mesh=mesh)
    assert apart(np.concatenate(list(decoding), axis=1), vae.decode(jnp.asarray(whole))) < TOLERANCE


@slow
def test_a_clip_in_chunks_and_frame_by_frame_is_divided_too(vae, clip, whole):
    posterior, video = whole
    mesh = mesh_of("data=2,height=2")
    assert apart(sharded.encode(vae, clip, mesh, chunk=8).mean, posterior.mean) < TOLERANCE
    frame_by_frame = nnx.clone(vae)
    frame_by_frame.execution = Execution(frame_by_frame=True)
    assert apart(sharded.decode(frame_by_frame, posterior.mean, mesh), video) < TOLERANCE


def test_what_a_mesh_cannot_divide_is_refused_before_anything_is_computed(vae, clip):
    with pytest.raises(ValueError, match="over time=4: expected clips of 32k"):
        sharded.encode(vae, clip, mesh_of("time=4"))
    with pytest.raises(ValueError, match="one after the other what time divides"):
        sharded.encode(vae, clip, mesh_of("time=2"), chunk=8)
    with pytest.raises(ValueError, match="dropout draws of a clip as a whole"):
        trainer("time=2", model=replace(MODEL, encoder_block_dropout=(0.1, 0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="2 clips over data=8"):
        trainer("data=8")
    with pytest.raises(ValueError, match="give a mesh too"):
        trainer(fsdp=True)
    for lpips, kind in ((True, "none"), (False, "frames")):
        with pytest.raises(ValueError, match="height or width among 2: expected a multiple of 32, from 64 on"):
            trainer("width=2", lpips=lpips, kind=kind)


def trainer(
    text=None,
    model=MODEL,
    size=32,
    batch=2,
    fsdp=False,
    kind: Any = "none",
    regularizer: Any = "none",
    lpips=False,
):
    """Returns a trainer that computes in float64, of models with random weights, on a mesh or on one device."""
    from tests.conftest import randomize

    sizes = {"frames": ((4, 6, 8),), "causal": ((4, 6, 8), 2)}
    classes = {"frames": PatchDiscriminator, "causal": CausalPatchDiscriminator}
    discriminator = None if kind == "none" else randomize(lambda rngs: classes[kind](*sizes[kind], rngs=rngs))
    distance = randomize(lambda rngs: LPIPS((4,) * 5, rngs=rngs)) if lpips else None
    config = replace(
        TRAINING,
        clips=replace(TRAINING.clips, size=size, batch=batch),
        gan=GanConfig(kind, regularizer=regularizer),
        loss=LossConfig(lpips=float(lpips), lpips_frames=3),
    )
    object.__setattr__(config, "precision", "float64")  # a run has no such precision
    vae = randomize(lambda rngs: CausalVideoVAE(model, rngs=rngs))
    mesh = None if text is None else mesh_of(text)
    return Trainer(config, vae, distance, discriminator, mesh=mesh, fsdp=fsdp)


def stepped(training, clip):
    """Takes a first step; returns its metrics and the gradients, of which AdamW's first moments are shares."""
    with_gan = training.config.gan.kind != "none"
    state, metrics = training.step(training.start(), clip, with_gan=with_gan)
    moments = [state.optimizer[1].mu, state.discriminator_optimizer and state.discriminator_optimizer[1].mu]
    return jax.device_get(metrics), [np.asarray(leaf) for leaf in jax.tree.leaves(moments)]


def check_equal(found, expected):
    """Losses agree, and gradients: each to the largest value of its own, or to that of all where it is all rounding."""
    (metrics, gradients), (its_metrics, its_gradients) = found, expected
    for name, value in its_metrics.items():
        assert abs(metrics[name] - value) <= TOLERANCE * abs(value), name
    largest = max(np.abs(leaf).max() for leaf in its_gradients)
    for a, b in zip(gradients, its_gradients, strict=True):
        scale = np.abs(b).max()
        assert np.abs(a - b).max() <= TOLERANCE * (scale if scale > 1e-9 * largest else largest)


LITTLE = {"model": CONFIG, "size": 8}
FRAMES_GAN = {"model": CONFIG, "size": 64, "kind": "frames", "regularizer": "r1", "lpips": True}
CAUSAL_GAN = {"model": CONFIG, "size": 64, "kind": "causal", "regularizer": "lecam"}


@pytest.fixture(scope="module")
def expected(noise):
    """Returns a function of a trainer's settings: a clip, and what a step on it gives on one device."""
    clips = {8: noise((2, 9, 8, 8, 3)), 32: noise((2, 17, 32, 32, 3)), 64: noise((2, 9, 64, 64, 3))}

    @functools.cache
    def step(settings):
        clip = np.asarray(clips[dict(settings).get("size", 32)])
        return clip, stepped(trainer(**dict(settings)), clip)

    return lambda settings: step(tuple(settings.items()))


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        pytest.param("time=2,height=2", LITTLE, marks=slow),
        *(pytest.param(text, FRAMES_GAN, marks=slow) for text in MESHES),
        *(pytest.param(text, CAUSAL_GAN, marks=slow) for text in ("time=2", MIXED)),
        pytest.param(MIXED, {}, marks=slow),
    ],
)
def test_losses_and_all_gradients_on_a_mesh_are_those_of_one_device(expected, text, settings):
    clip, alone = expected(settings)
    check_equal(stepped(trainer(text, **settings), clip), alone)


def test_noise_of_a_clip_in_parts_is_that_of_the_whole(noise):
    clip = DiagonalGaussian(noise((2, 5, 3, 4, 2)), noise((2, 5, 3, 4, 2), 1))
    parts = [jax.tree.map(lambda x, part=part: x[:, part], clip) for part in (slice(1), slice(1, None))]
    found = sampled(parts, jax.random.key(3), mesh_of("time=2"))
    np.testing.assert_array_equal(np.concatenate(found, axis=1), clip.sample(jax.random.key(3)))


def test_a_per_frame_function_gets_each_frame_once_and_in_order(noise):
    clips, mesh = [np.asarray(noise((4, 9, 2, 2, 3), seed)) for seed in (0, 1)], mesh_of("data=2,time=4")

    def products(a, b):
        return (a * b).sum(axis=(2, 3, 4))

    @jax.jit
    def found(*clips):
        pairs = zip(*clips, strict=True)
        return [parallel.map_frames(products, *pair, mesh=mesh, part=part) for part, pair in enumerate(pairs)]

    result = joined(found(*(parallel.shard(clip, mesh) for clip in clips)))
    np.testing.assert_allclose(result, products(*clips), rtol=1e-12)
    alone = parallel.map_frames(products, *map(jnp.asarray, clips), mesh=None, part=0)
    np.testing.assert_allclose(alone, products(*clips), rtol=1e-12)


@slow
def test_weights_divided_among_devices_give_the_same_losses_and_gradients(expected):
    clip, alone = expected({})
    check_equal(stepped(trainer("data=2", fsdp=True), clip), alone)


@slow
def test_devices_exchange_borders_and_sums_and_no_clips(expected):
    """But for the middle block's attention, whose queries need the keys and values of all pixels of their frame."""
    training = trainer(MIXED, **FRAMES_GAN)
    found = program(text(training.lower((2, 9, 64, 64), with_gan=True).compile())).exchanges
    assert {each.kind for each in found} <= {"collective-permute", "all-reduce", "all-gather"}
    assert {each.kind for each in found} >= {"collective-permute", "all-reduce"}
    pixels = 32 * 32  # of a frame of latents
    gathered = {dims for each in found if each.kind == "all-gather" for _, dims in each.arrays if math.prod(dims) > 64}
    assert all(len(dims) == 4 and dims[2] == pixels for dims in gathered), gathered


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
def test_stacked_frames_leave_the_batch_divided(stride):
    mesh = mesh_of("data=8")
    x, kernel = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*axes)))
        for shape, axes in (((8, 5, 16, 16, 48), ["data"]), ((3, 3, 3, 48, 48), []))
    )
    window = Window(stride, ((2, 0), (1, 1), (1, 1)), lowering="stacked")
    gradients = jax.jit(jax.grad(lambda *inputs: jnp.square(convolve(*inputs, window)).sum(), (0, 1)))
    assert {each.kind for each in program(text(gradients.lower(x, kernel).compile())).exchanges} == {"all-reduce"}


@pytest.mark.parametrize("axes", ["height=2", "width=4"])
def test_attention_in_parts_exchanges_pixels_and_no_scores(axes, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 20_000)
    sharding = jax.NamedSharding(mesh_of(axes), jax.P("data", "time", "height", "width"))
    x = jax.ShapeDtypeStruct((1, 1, 16, 16, 8), jnp.float32, sharding=sharding)
    found = program(text(jax.jit(attention.attend, out_shardings=sharding).lower(x, x, x).compile())).exchanges
    assert {each.kind for each in found} <= {"all-gather", "all-reduce"}
    assert max(math.prod(dims) for each in found for _, dims in each.arrays) <= math.prod(x.shape)


@slow
def test_a_halo_without_its_gradient_would_be_noticed(expected, monkeypatch):
    """The usual mistake of hand-written parallel convolutions: no gradient goes back to where a halo came from."""
    clip, (_, gradients) = expected(LITTLE)
    right = TimeHalo._sent
    monkeypatch.setattr(TimeHalo, "_sent", lambda self, *args: lax.stop_gradient(right(self, *args)))
    _, wrong = stepped(trainer("time=2", **LITTLE), clip)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(wrong, gradients, strict=True) if b.any()]
    assert max(errors) > 0.01


@slow
def test_a_run_goes_on_with_half_the_devices_and_half_of_those(tmp_path):
    clips = np.asarray(to_uint8(np.random.default_rng(0).uniform(-1, 1, (3, 8, 1, 32, 32, 3))))
    alone = trainer(batch=8)
    state, losses = alone.start(), []
    for frames in clips:
        state, metrics = alone.step(state, frames, with_gan=False)
        losses.append(float(metrics["total"]))
    for devices, frames, expected in zip((8, 4, 2), clips, losses, strict=True):
        training = trainer(f"data={devices}", batch=8, fsdp=True)
        state = training.start()
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
        if checkpoints.newest() is not None:
            state = checkpoints.restore(state)
        state, metrics = training.step(state, frames, with_gan=False)
        assert float(metrics["total"]) == pytest.approx(expected, rel=1e-12)
        checkpoints.save(int(state.step), state)
        checkpoints.close()
