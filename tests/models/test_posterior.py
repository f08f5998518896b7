"""The posterior against its formulas in numpy: b batch, t frames, h w latent pixels, z channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vae import DiagonalGaussian


@pytest.fixture
def moments(noise):
    """Means about 0, log variances about -2, two of them out of range."""
    values = noise((2, 3, 2, 4, 6)) - jnp.asarray([0.0, 0, 0, 2, 2, 2]).reshape(1, 1, 1, 1, 6)
    return values.at[0, 0, 0, 0, 3:5].set(jnp.asarray([-31.0, 20.5]))


def test_channels_are_mean_then_clamped_log_variance(moments):
    posterior = DiagonalGaussian.from_moments(moments)
    mean, logvar = np.asarray(moments[..., :3]), np.clip(moments[..., 3:], -30.0, 20.0)
    assert np.array_equal(posterior.mean, mean)
    assert np.array_equal(posterior.mode(), mean)
    assert np.array_equal(posterior.logvar, logvar)
    assert np.allclose(posterior.std, np.exp(logvar / 2), rtol=1e-6)
    assert posterior.logvar[0, 0, 0, 0, :2].tolist() == [-30.0, 20.0]


def test_sample_is_mean_plus_std_times_the_noise_of_the_key(moments):
    posterior = DiagonalGaussian.from_moments(moments)
    unit = np.asarray(jax.random.normal(jax.random.key(3), posterior.mean.shape))
    wanted = np.asarray(posterior.mean) + np.exp(np.asarray(posterior.logvar) / 2) * unit
    assert np.allclose(posterior.sample(jax.random.key(3)), wanted, rtol=1e-5)
    assert not np.allclose(posterior.sample(jax.random.key(4)), wanted, rtol=1e-5)


def test_samples_have_the_mean_and_variance_they_say():
    shape = (1, 50, 40, 20, 1)
    posterior = DiagonalGaussian(jnp.full(shape, 1.5), jnp.full(shape, 2 * np.log(0.3)))
    sample = posterior.sample(jax.random.key(0))
    assert abs(sample.mean() - 1.5) < 5 * 0.3 / 200
    assert abs(sample.std() - 0.3) < 0.01


def test_bfloat16_samples_use_the_noise_of_float32(moments):
    posterior = DiagonalGaussian.from_moments(moments[1:].astype(jnp.bfloat16))
    sample = posterior.sample(jax.random.key(3))
    wide = DiagonalGaussian(posterior.mean.astype(jnp.float32), posterior.logvar.astype(jnp.float32))
    assert sample.dtype == jnp.bfloat16
    assert np.allclose(sample.astype(jnp.float32), wide.sample(jax.random.key(3)), rtol=0.02, atol=0.02)


def test_kl_sums_over_the_clip_and_averages_over_batch_and_channels(noise):
    moments = noise((2, 3, 2, 4, 6))
    mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    total = 0.0
    for m, v in zip(mean.ravel(), logvar.ravel(), strict=True):
        total += 0.5 * (m**2 + np.exp(v) - 1 - v)
    kl = DiagonalGaussian.from_moments(moments).kl()
    assert kl.shape == ()
    assert np.isclose(kl, total / (2 * 3), rtol=1e-6)
    assert not np.isclose(kl, total / 2, rtol=0.1)


def test_kl_is_the_divergence_that_samples_estimate():
    shape = (1, 100, 50, 20, 1)
    posterior = DiagonalGaussian(jnp.full(shape, 0.7), jnp.full(shape, -1.0))
    x = np.asarray(posterior.sample(jax.random.key(0)), np.float64)
    log_ratio = -0.5 * ((x - 0.7) ** 2 / np.exp(-1.0) - 1.0) + 0.5 * x**2
    assert np.isclose(posterior.kl(), log_ratio.sum(), rtol=0.02)


def test_standard_normal_has_no_divergence():
    zero = jnp.zeros((1, 2, 3, 4, 5))
    assert DiagonalGaussian(zero, zero).kl() == 0.0


def test_kl_of_bfloat16_is_summed_in_float32(noise):
    moments = noise((1, 9, 16, 16, 4)).astype(jnp.bfloat16)
    kl = DiagonalGaussian.from_moments(moments).kl()
    assert kl.dtype == jnp.float32
    assert np.isclose(kl, DiagonalGaussian.from_moments(moments.astype(jnp.float32)).kl(), rtol=1e-6)


def test_odd_number_of_moments_is_refused(noise):
    with pytest.raises(ValueError, match=r"an even number of channels, got \(1, 2, 3, 4, 5\)"):
        DiagonalGaussian.from_moments(noise((1, 2, 3, 4, 5)))


def test_posterior_passes_through_jit_vmap_and_tree_map(moments):
    posterior = jax.jit(DiagonalGaussian.from_moments)(moments)
    halves = jax.vmap(lambda item: DiagonalGaussian.from_moments(item[None]))(moments)
    assert np.array_equal(halves.mean[:, 0], posterior.mean)
    assert jax.tree.map(jnp.shape, posterior).logvar == (2, 3, 2, 4, 3)
