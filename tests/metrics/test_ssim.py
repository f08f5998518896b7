"""SSIM against scikit-image and against its formula; seams that are there, and what looks like one and is none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vae import to_float
from flax_vae.metrics import seams
from flax_vae.metrics.seams import Seam, by_frame, by_position, shortest
from flax_vae.metrics.ssim import ssim

filters = pytest.importorskip("scipy.ndimage", reason="the reference for SSIM needs scipy")
seam: Any = seams.seam  # None only where clips are short


def frames(seed=0, shape=(2, 3, 24, 33, 3)):
    """Returns smooth uint8 clips, and the same with noise of another strength in each frame."""
    random = np.random.default_rng(seed)
    smooth = filters.gaussian_filter(random.normal(size=shape), (0, 0, 2, 2, 0)) * 300 + 120
    strength = np.linspace(1, 60, shape[1]).reshape(1, -1, 1, 1, 1)
    noisy = smooth + random.normal(size=shape) * strength
    clean, noisy = (np.rint(x).clip(0, 255).astype(np.uint8) for x in (smooth, noisy))
    return clean, noisy


def by_formula(a, b, blur, unbiased=1.0):
    """Returns the SSIM of two uint8 frames (H, W, C) in float64, with the windows of `blur`."""
    a, b = a.astype(float), b.astype(float)
    mean_a, mean_b = blur(a), blur(b)
    variances = unbiased * (blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2)
    covariance = unbiased * (blur(a * b) - mean_a * mean_b)
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    map = (2 * mean_a * mean_b + first) * (2 * covariance + second)
    map /= (mean_a**2 + mean_b**2 + first) * (variances + second)
    return map[5:-5, 5:-5].mean()


def mirrored(x):
    return np.pad(x, [(5, 5), (5, 5), (0, 0)], "symmetric")


def gaussian(x):
    return filters.gaussian_filter(x, (1.5, 1.5, 0), radius=(5, 5, 0))


WRONG: dict[str, Any] = {
    "windows of 7 x 7, all alike": lambda a, b: by_formula(a, b, lambda x: filters.uniform_filter(x, (7, 7, 1))),
    "sigma of 1": lambda a, b: by_formula(a, b, lambda x: filters.gaussian_filter(x, (1, 1, 0))),
    "sample covariance": lambda a, b: by_formula(a, b, gaussian, unbiased=121 / 120),
    "borders too": lambda a, b: by_formula(mirrored(a), mirrored(b), gaussian),
    "over channels too": lambda a, b: by_formula(a, b, lambda x: filters.gaussian_filter(x, 1.5, radius=(5, 5, 1))),
}


def ours(a, b):
    return np.asarray(jax.jit(ssim)(jnp.asarray(to_float(b)), jnp.asarray(to_float(a))))


def each(function: Any, a, b):
    return np.array([[function(*pair) for pair in zip(*clips, strict=True)] for clips in zip(a, b, strict=True)])


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="the comparison needs scikit-image")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    a, b = frames()
    expected = each(lambda a, b: metrics.structural_similarity(a, b, channel_axis=-1, **options), a, b)
    assert expected.min() < 0.5 < 0.9 < expected.max()
    assert ours(a, b) == pytest.approx(expected, abs=2e-6)
    assert each(lambda a, b: by_formula(a, b, gaussian), a, b) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_its_formula():
    a, b = frames(seed=1)
    assert ours(a, b) == pytest.approx(each(lambda a, b: by_formula(a, b, gaussian), a, b), abs=2e-6)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_formula_would_be_found(mistake):
    a, b = frames()
    assert np.abs(ours(a, b) - each(WRONG[mistake], a, b)).max() > 1e-4


def test_ssim_of_flat_frames_does_not_drown_in_rounding():
    random = np.random.default_rng(2)
    a = 250 + random.integers(0, 2, (1, 2, 20, 20, 3), np.uint8)
    b = a + random.integers(0, 2, a.shape, np.uint8)
    assert ours(a, b) == pytest.approx(each(lambda a, b: by_formula(a, b, gaussian), a, b), abs=2e-6)


def test_ssim_of_equal_frames_is_one_and_of_the_negative_below_zero():
    a, _ = frames()
    assert ours(a, a) == pytest.approx(1, abs=1e-6)
    assert (ours(a, 255 - a) < 0).all()


@pytest.mark.parametrize(("shape", "other"), [((1, 1, 10, 20, 3),) * 2, ((1, 1, 20, 20, 3), (1, 2, 20, 20, 3))])
def test_ssim_of_small_or_unlike_frames_is_refused(shape, other):
    with pytest.raises(ValueError, match=r"of one shape .* of at least 11x11 pixels"):
        ssim(jnp.zeros(shape), jnp.zeros(other))


def patterned(length, factor, chunk, slope=0.05):
    """Returns a PSNR that rises, with a pattern in every latent, and a first frame of its own; no seam."""
    pattern = np.random.default_rng(factor).normal(size=factor)
    return np.array([40.0, *(30 + slope * i + pattern[i % factor] for i in range(length - 1))])


CHUNKS = [(16, 8), (32, 8), (8, 4), (12, 4), (4, 2), (4, 1)]


@pytest.mark.parametrize(("chunk", "factor"), CHUNKS)
def test_a_pattern_in_latents_and_a_trend_are_no_seam(chunk, factor):
    found = seam([patterned(8 * chunk, factor, chunk)], chunk, factor)
    assert found.score == pytest.approx(0, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.borders >= 6


@pytest.mark.parametrize(("chunk", "factor"), CHUNKS)
@pytest.mark.parametrize("where", ["first frame", "last frame", "both", "first latent"])
def test_a_planted_seam_is_found_as_deep_as_it_is(chunk, factor, where):
    values = patterned(8 * chunk, factor, chunk)
    place = (np.arange(len(values)) - 1) % chunk
    width = {"first latent": factor}.get(where, 1)
    hit = (place < width) * (where != "last frame") | (place == chunk - 1) * (where in ("last frame", "both"))
    values[1:] -= 2.5 * hit[1:]
    assert seam([values], chunk, factor).score == pytest.approx(-2.5, abs=1e-9)
    assert seam([values], chunk, factor).error == pytest.approx(0, abs=1e-9)


def test_noise_is_no_seam_within_the_standard_error_that_is_given():
    random = np.random.default_rng(3)
    found = [seam([patterned(129, 8, 16) + random.normal(size=129) for _ in range(5)], 16, 8) for _ in range(100)]
    assert np.std([each.first for each in found]) == pytest.approx(
        np.mean([each.first_error for each in found]), rel=0.3
    )
    assert np.mean([abs(each.first) < 2 * each.first_error for each in found]) > 0.85


def test_the_score_is_the_lower_side_with_its_own_error():
    for first, last in ((-1.0, -2.0), (-2.0, -1.0)):
        found = Seam(first, last, first_error=-0.1 * first, last_error=-0.1 * last, borders=9)
        assert (found.score, found.error) == (-2.0, 0.2)


def test_a_few_scene_cuts_are_no_seam():
    values = patterned(257, 8, 16)
    values[100:] -= 9
    values[205:] += 7
    assert seam([values], 16, 8).score == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("chunk", "factor"), CHUNKS)
def test_clips_too_short_for_a_border_with_neighbours_have_no_score(chunk, factor):
    least: Any = shortest(chunk, factor)
    assert seam([patterned(least - 1, factor, chunk)] * 3, chunk, factor) is None
    assert seam([patterned(least, factor, chunk)] * 3, chunk, factor).borders == 3
    assert seam([patterned(least, factor, chunk)], chunk, factor).error is None


@pytest.mark.parametrize(("chunk", "factor"), [(8, 8), (4, 4), (2, 1), (2, 2)])
def test_chunks_of_one_latent_have_no_frames_to_compare_with(chunk, factor):
    assert shortest(chunk, factor) is None
    assert seam([patterned(500, factor, chunk)], chunk, factor) is None


def test_means_are_taken_by_frame_and_by_place_in_the_chunk():
    clips = [[9.0, 1, 2, 3, 4, 5], [7.0], [5.0, 3, 4]]
    assert by_frame(clips) == [7, 2, 3, 3, 4, 5]
    assert by_position(clips, 4) == [3, 3, 3, 4]
    assert by_position(clips[1:], 4) == [3, 4, None, None]
