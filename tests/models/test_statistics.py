"""Statistics of latents, in parts and joined, against numpy over all values: b t h w z."""

import json
from functools import reduce
from operator import add

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vae import LatentScaling
from flax_vae.models.statistics import LatentStatistics, Moments


def draw(seed, t, b=1, z=3):
    """Returns mean and logvar of latents whose channels have spreads and places of their own."""
    rng = np.random.default_rng(seed)
    spread, place = np.array([0.1, 3.0, 40.0])[:z], np.array([500.0, -2.0, 0.0])[:z]
    mean = rng.standard_normal((b, t, 3, 2, z)) * spread + place
    return mean.astype(np.float32), rng.normal(-2, 1, mean.shape).astype(np.float32)


def expected(clips, cut):
    """Returns mean and std by channel over all latents of one kind: std of the means, and the posterior's own."""
    mean = np.concatenate([mean[:, cut].reshape(-1, mean.shape[-1]) for mean, _ in clips]).astype(np.float64)
    own = np.concatenate([np.exp(logvar[:, cut].reshape(-1, logvar.shape[-1]).astype(float)) for _, logvar in clips])
    return mean.mean(0), np.sqrt(mean.var(0) + own.mean(0))


@hypothesis.given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_parts_of_any_lengths_have_the_statistics_of_all_latents(lengths, seed):
    clips = [draw(seed + i, t) for i, t in enumerate(lengths)]
    total = reduce(add, (LatentStatistics.of(mean, logvar) for mean, logvar in clips))
    for moments, cut in ((total.first, slice(0, 1)), (total.rest, slice(1, None))):
        if sum(mean[:, cut].size for mean, _ in clips) == 0:
            assert moments.count == 0
            continue
        mean, std = expected(clips, cut)
        assert moments.count == sum(np.prod(mean[:, cut].shape[:-1]) for mean, _ in clips)
        assert np.allclose(moments.mean, mean, rtol=1e-9, atol=1e-9)
        assert np.allclose(moments.std, std, rtol=1e-6)


def test_files_of_one_clip_have_one_first_frame():
    mean, logvar = draw(1, 7)
    parts = [LatentStatistics.of(mean[:, a:b], logvar[:, a:b], a) for a, b in ((0, 3), (3, 5), (5, 7))]
    whole, joined = LatentStatistics.of(mean, logvar), reduce(add, parts)
    assert joined.first == whole.first
    assert joined.rest.count == whole.rest.count == 6 * 6
    assert np.allclose(joined.rest.mean, whole.rest.mean, rtol=1e-12, atol=1e-12)
    assert np.allclose(joined.rest.std, whole.rest.std, rtol=1e-9)


def test_the_posterior_s_own_spread_counts():
    rng = np.random.default_rng(2)
    mean, logvar = draw(2, 4, b=3)
    total = LatentStatistics.of(mean, logvar)
    samples = mean[:, 1:] + np.exp(logvar[:, 1:] / 2) * rng.standard_normal((2000, *mean[:, 1:].shape))
    assert np.allclose(total.rest.std, samples.std(axis=(0, 1, 2, 3, 4)), rtol=2e-2)
    narrow = np.full_like(logvar, -30)
    assert total.rest.std[0] > 1.5 * LatentStatistics.of(mean, narrow).rest.std[0]


def test_order_does_not_matter_beyond_rounding():
    clips = [LatentStatistics.of(*draw(i, 3)) for i in range(40)]
    one, other = reduce(add, clips), reduce(add, reversed(clips))
    assert np.allclose(one.rest.mean, other.rest.mean, rtol=1e-12, atol=1e-12)
    assert np.allclose(one.rest.std, other.rest.std, rtol=1e-9)


def test_a_far_mean_costs_no_digits():
    mean = (1e6 + np.random.default_rng(0).standard_normal((1, 5, 4, 4, 1))).astype(np.float64)
    parts = [LatentStatistics.of(mean[:, t : t + 1], np.full((1, 1, 4, 4, 1), -60.0), t) for t in range(5)]
    assert np.allclose(reduce(add, parts).rest.std, mean[:, 1:].std(), rtol=1e-9)


def test_statistics_pass_through_json_to_the_last_bit():
    total = LatentStatistics.of(*draw(5, 3))
    assert LatentStatistics.from_dict(json.loads(json.dumps(total.to_dict()))) == total


def test_scaling_brings_latents_to_mean_0_and_spread_1():
    mean, logvar = draw(3, 6, b=4)
    total = LatentStatistics.of(mean, logvar)
    scaling = LatentScaling.from_dict(json.loads(json.dumps(total.scaling().to_dict())))
    z = mean + np.exp(logvar / 2) * np.random.default_rng(1).standard_normal(mean.shape).astype(np.float32)
    y = np.asarray(scaling.normalize(jnp.asarray(z)))
    for part in (y[:, :1], y[:, 1:]):
        assert np.abs(part.mean(axis=(0, 1, 2, 3))).max() < 0.3
        assert np.abs(part.std(axis=(0, 1, 2, 3)) - 1).max() < 0.25


def test_images_alone_and_a_channel_that_never_changes_give_no_scaling():
    with pytest.raises(ValueError, match="later frames of clips there is none"):
        LatentStatistics.of(*draw(0, 1)).scaling()
    mean, logvar = draw(0, 3)
    mean[..., 1], logvar[..., 1] = 2.0, -np.inf
    with pytest.raises(ValueError, match="a channel that never changes"):
        LatentStatistics.of(mean, logvar).scaling()


def test_summary_has_every_channel_and_overall_all_of_them_as_one():
    total = LatentStatistics.of(*draw(4, 3))
    assert total.summary()["rest"] == {"count": 12, "mean": total.rest.mean, "std": total.rest.std}
    assert LatentStatistics.of(*draw(4, 1)).summary()["rest"]["std"] is None
    mean, logvar = draw(4, 3)
    values = mean[:, 1:].astype(np.float64)
    std = np.sqrt(values.var() + np.exp(logvar[:, 1:].astype(np.float64)).mean())
    assert total.rest.overall() == f"{values.mean():.4f}, {std:.4f}"
    assert Moments(0, (0.0,), (0.0,)).overall() == "none"
