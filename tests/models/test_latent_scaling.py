"""Latents scaled for a diffusion model, against numpy: b batch, t frames, h w latent pixels, z channels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig, LatentScaling

FLUX, SD3 = CausalVideoVAE.released_scalings["flux"], CausalVideoVAE.released_scalings["sd3"]
PER_CHANNEL = LatentScaling((0.1, -0.2, 0.3), (2.0, 3.0, 4.0), (0.5, 0.6, -0.7), (0.25, 0.5, 0.75))


@pytest.fixture
def latents(noise):
    return noise((2, 4, 3, 2, 3))


def scaled(z, first, rest):
    """Returns (z - shift) * scale frame by frame, each of `first` and `rest` a (shift, scale)."""
    frames = [
        (z[:, t] - np.asarray(shift)) * np.asarray(scale) for t, (shift, scale) in enumerate([first] + [rest] * 3)
    ]
    return np.stack(frames, axis=1)


@pytest.mark.parametrize(("variant", "first"), [("flux", (-0.04, 1 / 1.8726)), ("sd3", (0.149, 1 / 1.8415))])
def test_released_variants_scale_the_first_frame_apart(variant, first, latents):
    y = CausalVideoVAE.released_scalings[variant].normalize(latents)
    assert np.allclose(y, scaled(np.asarray(latents), first, (-0.2343, 1 / 3.0986)), rtol=1e-5, atol=1e-6)


def test_every_channel_may_have_its_own_statistics(latents):
    wanted = scaled(np.asarray(latents), ((0.1, -0.2, 0.3), (2, 3, 4)), ((0.5, 0.6, -0.7), (0.25, 0.5, 0.75)))
    assert np.allclose(PER_CHANNEL.normalize(latents), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", [FLUX, PER_CHANNEL], ids=["flux", "per channel"])
def test_later_chunk_has_no_first_frame(scaling, latents):
    whole = scaling.normalize(latents)
    later = scaling.normalize(latents[:, 2:], start=False)
    assert np.array_equal(later, whole[:, 2:])
    assert not np.allclose(scaling.normalize(latents[:, 2:]), whole[:, 2:], atol=1e-3)


def test_image_is_a_first_frame(latents):
    scaling = SD3
    assert np.array_equal(scaling.normalize(latents[:, :1]), scaling.normalize(latents)[:, :1])


@pytest.mark.parametrize("scaling", [SD3, PER_CHANNEL], ids=["sd3", "per channel"])
@pytest.mark.parametrize("start", [True, False])
def test_denormalize_undoes_normalize(scaling, start, latents):
    y = scaling.normalize(latents, start)
    assert np.allclose(scaling.denormalize(y, start), latents, rtol=1e-5, atol=1e-6)
    assert not np.allclose(scaling.denormalize(y, not start), latents, atol=1e-3)


def test_latents_keep_their_dtype_and_may_be_traced(latents):
    scaling = FLUX
    assert scaling.normalize(latents.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert scaling.denormalize(latents.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.allclose(jax.jit(scaling.normalize)(latents), scaling.normalize(latents), rtol=1e-6)
    mapped = jax.vmap(lambda item: scaling.normalize(item[None])[0])(latents)
    assert np.allclose(mapped, scaling.normalize(latents), rtol=1e-6)


def test_a_model_with_several_released_scalings_asks_which():
    vae = CausalVideoVAE.abstract(CausalVideoVAEConfig.tiny())
    with pytest.raises(ValueError, match=r"CausalVideoVAE has no one scaling: .* released_scalings \(flux, sd3\)"):
        _ = vae.scaling


def test_statistics_of_another_number_of_channels_are_refused(noise):
    with pytest.raises(ValueError, match="2 statistics"):
        LatentScaling((0.0, 1.0), 1.0, 0.0, 1.0).normalize(noise((1, 2, 3, 3, 1)))


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="cannot be undone"):
        LatentScaling(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("scaling", [SD3, PER_CHANNEL], ids=["sd3", "per channel"])
def test_statistics_pass_through_json_to_the_last_bit(scaling):
    assert LatentScaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling


def test_whole_numbers_are_statistics_too():
    values = {"first_shift": 0, "first_scale": [1, 2.5], "rest_shift": 0.0, "rest_scale": -1}
    assert LatentScaling.from_dict(values) == LatentScaling(0.0, (1.0, 2.5), 0.0, -1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"first_shift": "0"},
        {"first_shift": None},
        {"first_shift": True},
        {"first_shift": [0.0, None]},
        {"first_shift": [[0.0, 1.0]]},
        {"first_shift": [[0.0], [0.0, 1.0]]},
        {"first_shift": []},
        {"first_shift": float("nan")},
        {"first_scale": [1.0, float("inf")]},
        {"first_shift": 10**400},
        {"first_scale": {"a": 1}},
    ],
)
def test_what_is_no_finite_number_is_refused(change):
    with pytest.raises(ValueError, match="finite numbers, one or one a channel"):
        LatentScaling.from_dict(FLUX.to_dict() | change)


@pytest.mark.parametrize("values", [None, [1, 2, 3, 4], {}, {"first_shift": 0.0}, {"a" * 10**6: 1}])
def test_what_are_no_statistics_is_refused_with_what_was_expected(values):
    with pytest.raises(
        ValueError, match="expected the statistics first_shift, first_scale, rest_shift, rest_sc"
    ) as caught:
        LatentScaling.from_dict(values)
    assert len(str(caught.value)) < 300


def test_a_scale_of_zero_is_refused_in_a_file_too():
    with pytest.raises(ValueError, match="cannot be undone"):
        LatentScaling.from_dict(FLUX.to_dict() | {"rest_scale": [1.0, 0.0]})
