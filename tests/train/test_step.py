"""One step of training: what it takes, what it leaves as it was, and the optimizer by hand."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE
from flax_vae.io.pixels import to_float
from flax_vae.metrics.lpips import LPIPS
from flax_vae.train.config import GanConfig, LossConfig, OptimizerConfig, TrainConfig
from flax_vae.train.discriminator import PatchDiscriminator
from flax_vae.train.optimizer import move_ema, optimizer, schedule, updates
from flax_vae.train.step import Trainer, noise_key, pixels
from tests.little import ONE_BLOCK

CONFIG = TrainConfig(
    steps=20,
    precision="float32",
    loss=LossConfig(l1=0.3, lpips=0.0, kl=0.01),
    gan=GanConfig("frames", regularizer="lecam", regularizer_weight=0.7),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=4),
)
SHAPE = (1, 3, 16, 16, 3)


@pytest.fixture(autouse=True, scope="module")
def promoting():
    """Lets optax promote as it does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def discriminator():
    return PatchDiscriminator((4, 4), rngs=nnx.Rngs(1))


def made(config=CONFIG, lpips=None):
    """Returns a trainer of small models."""
    return Trainer(config, CausalVideoVAE(ONE_BLOCK, rngs=nnx.Rngs(0)), lpips, discriminator())


@pytest.fixture(scope="module")
def trainer():
    return made()


def frames(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, SHAPE).astype(np.float32)


def copied(state):
    return jax.tree.map(np.array, state)


def differing(state, other):
    """Names the fields of two states that hold other values."""
    return {
        name
        for name, value in vars(state).items()
        if not all(map(np.array_equal, jax.tree.leaves(value), jax.tree.leaves(getattr(other, name))))
    }


CHANGING = {"parameters", "ema", "optimizer", "discriminator", "discriminator_optimizer", "ema_logits"}


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_batch_that_is_not_finite_changes_nothing_and_is_counted(trainer, value):
    state, _ = trainer.step(trainer.start(), frames(), with_gan=True)
    before = copied(state)
    spoiled = frames(1)
    spoiled[0, 1, 2, 3, 0] = value
    for count in (1, 2):
        state, metrics = trainer.step(state, spoiled, with_gan=True)
        assert differing(state, before) == {"step", "skipped"}
        assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (1 + count, count, count)
    state, metrics = trainer.step(state, frames(1), with_gan=True)
    assert differing(state, before) == CHANGING | {"step"}
    assert int(metrics["skipped"]) == 0
    assert all(np.isfinite(value) for value in metrics.values())


def test_state_that_is_not_finite_spoils_nothing_else(trainer):
    state = trainer.start()
    state = replace(state, parameters=jax.tree.map(lambda leaf: leaf * jnp.nan, state.parameters))
    before = copied(state)
    state, metrics = trainer.step(state, frames(), with_gan=True)
    assert not np.isfinite(metrics["total"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.ema, state.discriminator)))
    assert {"ema", "optimizer", "discriminator"}.isdisjoint(differing(state, before))


def test_state_before_a_step_is_donated(trainer):
    state = trainer.start()
    trainer.step(state, frames(), with_gan=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.parameters, state.optimizer, state.discriminator)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.start()))


def test_same_state_and_batch_give_the_same_bits(trainer):
    (one, metrics), (other, its) = (trainer.step(trainer.start(), frames(), with_gan=True) for _ in range(2))
    assert not differing(one, other)
    assert metrics == its


def test_every_step_has_noise_of_its_own(trainer):
    later = replace(trainer.start(), step=jnp.int32(1))
    first, second = (trainer.step(state, frames(), with_gan=True)[1] for state in (trainer.start(), later))
    assert first["kl"] == second["kl"]
    assert first["mse"] != second["mse"]
    assert len({tuple(jax.random.key_data(noise_key(seed, step)).tolist()) for seed in (0, 1) for step in (0, 1)}) == 4


def weighed(trainer, state, video):
    """Returns what a step measures, and the gradients of the VAE and of its discriminator, loss by loss."""
    key, structure = noise_key(CONFIG.seed, state.step), nnx.split(discriminator())[0]

    def losses(parameters):
        vae = trainer.vae(parameters)
        posterior = vae.encode(video)
        output = vae.decode(posterior.sample(key))
        mse, l1 = jnp.square(output - video).mean(), jnp.abs(output - video).mean()
        terms = {"mse": mse, "l1": l1, "kl": posterior.kl()}
        gan = -nnx.merge(structure, state.discriminator)(output).mean()
        return (CONFIG.loss.mse * mse + CONFIG.loss.l1 * l1, posterior.kl(), gan), (terms, output)

    def discriminated(parameters, output):
        real, fake = (nnx.merge(structure, parameters)(clip) for clip in (video, output))
        hinge = (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
        ema_real, ema_fake = state.ema_logits
        away = jax.nn.relu(real - ema_fake), jax.nn.relu(ema_real - fake)
        lecam = jnp.square(away[0]).mean() + jnp.square(away[1]).mean()
        terms = {"discriminator": hinge, "lecam": lecam, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return hinge + CONFIG.gan.regularizer_weight * lecam, terms

    (loss, kl, gan), vjp, (metrics, output) = jax.vjp(losses, state.parameters, has_aux=True)
    (by_loss,), (by_gan,) = (vjp(tuple(map(jnp.float32, weights))) for weights in ((1, CONFIG.loss.kl, 0), (0, 0, 1)))
    # the divergence has no gradient by the decoder's last kernel
    lengths = [jnp.linalg.norm(g["decoder"]["conv_out"]["conv"]["kernel"][...].ravel()) for g in (by_loss, by_gan)]
    weight = CONFIG.gan.weight * lengths[0] / (lengths[1] + 1e-4)
    gradients = jax.tree.map(lambda a, b: a + weight * b, by_loss, by_gan)
    its_gradients, more = jax.grad(discriminated, has_aux=True)(state.discriminator, output)
    metrics |= more | {"gan": gan, "gan_weight": weight, "total": loss + CONFIG.loss.kl * kl}
    return metrics, (gradients, its_gradients)


def test_a_step_is_that_of_the_losses_by_their_weights(trainer, randomized):
    weights = nnx.state(randomized(lambda rngs: CausalVideoVAE(ONE_BLOCK, rngs=rngs)), nnx.Param)
    ema_logits = (0.3, -0.2)
    state = replace(trainer.start(), parameters=weights, ema=jax.tree.map(jnp.copy, weights))
    state = replace(state, step=jnp.int32(3), ema_logits=tuple(map(jnp.float32, ema_logits)))
    expected, gradients = jax.jit(partial(weighed, trainer))(state, frames())
    before = copied(state.parameters)
    state, metrics = trainer.step(state, frames(), with_gan=True)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    norms = metrics["gradient_norm"], metrics["discriminator_gradient_norm"]
    for norm, by_hand, moments in zip(norms, gradients, (state.optimizer, state.discriminator_optimizer), strict=True):
        pairs = list(zip(jax.tree.leaves(by_hand), jax.tree.leaves(moments[1].mu), strict=True))
        length = np.sqrt(sum(np.square(gradient).sum() for gradient, _ in pairs))
        np.testing.assert_allclose(norm, length, rtol=1e-4)
        for gradient, moment in pairs:  # a tenth of the gradient, which is cut to the clip
            scale = 0.1 * min(1, CONFIG.optimizer.clip / length)
            np.testing.assert_allclose(moment, scale * gradient, rtol=0, atol=1e-4 * scale * length)
    for before_it, logit, now in zip(ema_logits, ("logits_real", "logits_fake"), state.ema_logits, strict=True):
        np.testing.assert_allclose(now, 0.99 * before_it + 0.01 * metrics[logit], rtol=1e-5)
    assert metrics["learning_rate"] == pytest.approx(CONFIG.optimizer.learning_rate / CONFIG.optimizer.warmup)
    for first, now, ema in zip(*map(jax.tree.leaves, (before, state.parameters, state.ema)), strict=True):
        np.testing.assert_allclose(ema, first + (1 - 2 / 11) * (now - first), rtol=1e-5, atol=1e-7)


def test_ema_moves_when_the_optimizer_does_and_not_at_every_batch():
    trainer = made(replace(CONFIG, optimizer=replace(CONFIG.optimizer, accumulate=2)))
    state, accepted = trainer.start(), jax.jit(trainer._accepted)
    moved = jax.tree.map(lambda leaf: leaf + 1, state.parameters)
    for updates_before, updates_after, share in ((0, 0, 0.0), (0, 1, 1 - 2 / 11), (1, 1, 0.0), (1, 2, 1 - 3 / 12)):
        before, after = (state.optimizer._replace(gradient_step=jnp.int32(n)) for n in (updates_before, updates_after))
        now = replace(state, optimizer=before)
        found, _ = accepted(now, now, moved, after, state.random_counts, {"total": jnp.float32(1)})
        for first, ema in zip(*map(jax.tree.leaves, (state.ema, found.ema)), strict=True):
            np.testing.assert_allclose(ema, first + share, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_for_computing_and_not_for_weights(trainer):
    narrow = made(replace(CONFIG, precision="bfloat16"))
    (state, metrics), (_, exact) = (each.step(each.start(), frames(), with_gan=True) for each in (narrow, trainer))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.parameters, state.ema, state.discriminator))} == {
        np.dtype(np.float32)
    }
    for name in ("mse", "kl", "gradient_norm", "discriminator"):
        assert metrics[name] != exact[name]
        np.testing.assert_allclose(metrics[name], exact[name], rtol=0.03, err_msg=name)


def test_ema_weights_are_those_of_the_model_for_inference(trainer):
    state, _ = trainer.step(trainer.start(), frames(), with_gan=True)
    vae = trainer.vae(state.ema)
    expected, found = jax.tree.leaves(state.ema), jax.tree.leaves(nnx.state(vae, nnx.Param))
    assert all(map(np.array_equal, found, expected))


def test_weights_of_lpips_are_no_constants_of_the_program():
    trainer = made(replace(CONFIG, loss=LossConfig()), LPIPS((4, 4, 4, 4, 64), rngs=nnx.Rngs(0)))
    weights = jax.tree.leaves(trainer._lpips_weights)
    step = partial(trainer._step, with_gan=True)
    program = jax.make_jaxpr(step)(trainer.start(), trainer._lpips_weights, (frames(),))
    assert sum(leaf.size for leaf in weights) > 70_000
    assert sum(np.size(constant) for constant in program.consts) < 1000


def test_pixels_are_mapped_as_everywhere():
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1)
    mapped = jax.jit(pixels, static_argnums=1)(values, np.dtype(np.float32))
    np.testing.assert_allclose(mapped, to_float(values), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(pixels(jnp.asarray(frames()), np.dtype(np.float32)), frames())
    with pytest.raises(ValueError, match="int32"):
        pixels(jnp.zeros(SHAPE, jnp.int32), np.dtype(np.float32))


@pytest.mark.parametrize(
    ("steps", "warmup", "count", "expected"),
    [
        (100, 10, 0, 0.1),
        (100, 10, 4, 0.5),
        (100, 10, 9, 1.0),
        (100, 10, 99, 0.01),
        (101, 1, 50, 0.505),
        (100, 0, 0, 1.0),
        (50, 2000, 24, 0.5),
        (50, 2000, 49, 1.0),
        (100, 10, 500, 0.01),
    ],
)
def test_learning_rate_rises_from_the_first_step_on_and_falls_to_the_last(steps, warmup, count, expected):
    rates = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.01, warmup=warmup)
    np.testing.assert_allclose(schedule(rates, steps)(count), expected, rtol=1e-5)


def test_optimizer_is_clipped_adam_with_decay_of_kernels_alone():
    rates = OptimizerConfig(learning_rate=0.1, warmup=1, weight_decay=0.5, clip=1.0, accumulate=2)
    parameters = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    gradients = [{"kernel": jnp.array([[0.6, 0.0]]), "bias": jnp.array([g])} for g in (0.8, -0.8)]
    transformation = optimizer(rates, 200)
    state = transformation.init(parameters)
    update: Any = transformation.update  # of dicts here
    changes, state = update(gradients[0], state, parameters)
    assert updates(state) == 0
    assert not any(leaf.any() for leaf in changes.values())
    changes, state = update(gradients[1], state, parameters)
    assert updates(state) == 1
    # Their mean is [0.6, 0] and 0; the first step of Adam has the sign of the gradient.
    np.testing.assert_allclose(changes["kernel"], [[-0.1 * (1 + 0.5), 0.1 * 2 * 0.5]], rtol=1e-6)
    assert changes["bias"] == 0


def test_gradients_of_accumulated_batches_are_averaged():
    rates = OptimizerConfig(warmup=1, weight_decay=0.0, clip=100.0, accumulate=4)
    transformation, parameters = optimizer(rates, 200), {"kernel": jnp.array([[0.0, 0.0]])}
    state, update = transformation.init(parameters), jax.jit(transformation.update)
    for value in (1.0, 2.0, 3.0, 6.0):
        _, state = update({"kernel": jnp.array([[value, -value]])}, state, parameters)
    np.testing.assert_allclose(state.inner_opt_state[1].mu["kernel"], [[0.1 * 3, -0.1 * 3]], rtol=1e-6)


def test_long_gradients_are_cut_to_the_clip():
    rates = OptimizerConfig(learning_rate=1.0, warmup=1, weight_decay=0.0, clip=1e-8)
    transformation = optimizer(rates, 200)
    gradients = {"kernel": jnp.array([[3.0, 4.0]])}
    update: Any = transformation.update
    changes, _ = update(gradients, transformation.init(gradients), gradients)
    # Adam's eps of 1e-8 tells how long the gradient was that it saw.
    np.testing.assert_allclose(changes["kernel"], [[-0.6 / 1.6, -0.8 / 1.8]], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_first_steps_of_adam_are_right_to_the_last_digits(count):
    transformation = optimizer(OptimizerConfig(learning_rate=1.0, warmup=1, weight_decay=0.0), 10**9)
    gradient, state = {"kernel": jnp.array([[0.3, -0.01]])}, None
    state = transformation.init(gradient)
    update = jax.jit(transformation.update)
    for _ in range(count):
        changes, state = update(gradient, state, gradient)
    np.testing.assert_allclose(changes["kernel"], [[-1, 1]], rtol=3e-6)


def test_muon_goes_as_far_in_all_directions_and_leaves_vectors_to_adam():
    rates = OptimizerConfig(kind="muon", learning_rate=1.0, warmup=1, weight_decay=0.0)
    rng, transformation = np.random.default_rng(0), optimizer(rates, 10**9)
    kernel = rng.normal(size=(3, 3, 3, 4, 6)) * np.array([1, 0.1, 0.01, 1, 0.1, 0.01])  # directions of unequal length
    gradients = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.array([0.3, -0.01])}
    update: Any = jax.jit(transformation.update)
    changes, state = update(gradients, transformation.init(gradients), gradients)
    lengths = np.linalg.svd(-np.asarray(changes["kernel"]).reshape(108, 6), compute_uv=False) / (0.2 * 108**0.5)
    assert np.linalg.cond(kernel.reshape(108, 6)) > 80
    assert lengths.min() > 0.6  # its five iterations come no nearer to 1
    assert lengths.max() < 1.3
    assert np.vdot(kernel, changes["kernel"]) < 0
    np.testing.assert_allclose(changes["bias"], [-1, 1], rtol=1e-4)
    assert updates(state) == 1


def test_ema_moves_by_one_minus_its_decay():
    ema = move_ema({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 2.0])}, jnp.float32(0.75))
    np.testing.assert_allclose(ema["a"], [1.5, 2.0])
    kept = move_ema({"a": jnp.array([1.1, 2.0])}, {"a": jnp.array([3.0, 7.0])}, jnp.float32(1.0))
    np.testing.assert_array_equal(kept["a"], np.array([1.1, 2.0], np.float32))
