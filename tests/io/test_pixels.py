"""Pixels between uint8 and float, and the sizes that clips are brought to."""

import numpy as np
import pytest

from flax_vae.io.pixels import fit_size, to_float, to_uint8

hypothesis = pytest.importorskip("hypothesis", reason="sizes are drawn by hypothesis: pip install hypothesis")
given, st = hypothesis.given, hypothesis.strategies


@pytest.mark.parametrize("shape", [(256,), (2, 1, 8, 16), (2, 2, 4, 4, 4)])
def test_every_pixel_value_survives_the_way_to_float_and_back(shape):
    pixels = np.arange(256, dtype=np.uint8).reshape(shape)
    floats = to_float(pixels)
    assert floats.dtype == np.float32
    assert floats.min() == -1
    assert floats.max() == 1
    assert np.array_equal(to_uint8(floats), pixels)
    nudged = floats + np.random.default_rng(0).uniform(-0.0039, 0.0039, shape)
    assert np.array_equal(to_uint8(nudged), pixels)


def test_values_outside_are_clipped_and_nonsense_is_refused():
    assert to_uint8(np.array([-1e30, -1.5, 1.01, 7, 1e30])).tolist() == [0, 0, 255, 255, 255]
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="frames hold NaN or infinity"):
            to_uint8(np.array([0.5, wrong]))
    with pytest.raises(ValueError, match="int64"):
        to_uint8(np.array([3]))
    with pytest.raises(ValueError, match="float64"):
        to_float(np.array([0.5]))


sides = st.integers(1, 5000)
multiples = st.sampled_from([1, 2, 8, 16, 24])


@given(sides, sides, multiples)
def test_own_size_is_cropped_by_less_than_one_multiple(height, width, multiple):
    for side, fitted in zip((height, width), fit_size(height, width, multiple), strict=True):
        assert fitted > 0
        assert fitted % multiple == 0
        if min(height, width) >= multiple:
            assert side - multiple < fitted <= side


@pytest.mark.parametrize(
    ("clip", "multiple", "size", "expected"),
    [
        ((272, 640), 8, None, (272, 640)),
        ((1080, 1920), 8, 256, (256, 448)),
        ((1999, 1000), 1, 100, (200, 100)),
        ((5, 100), 8, None, (8, 160)),
        ((720, 1280), 16, (250, 250), (240, 240)),
    ],
)
def test_sizes_by_example(clip, multiple, size, expected):
    assert fit_size(clip[0], clip[1], multiple, size) == expected


@given(sides, sides, multiples, st.integers(1, 2000))
def test_short_side_is_what_was_asked_and_the_shape_is_kept(height, width, multiple, size):
    if size < multiple:
        with pytest.raises(ValueError, match=f"size={size}"):
            fit_size(height, width, multiple, size)
        return
    fitted = fit_size(height, width, multiple, size)
    assert min(fitted) == size // multiple * multiple
    longer = max(height, width) * size / min(height, width)
    assert longer - multiple - 0.5 <= max(fitted) <= longer + 0.5
    assert (fitted[0] - fitted[1]) * (height - width) >= 0


@given(sides, sides, multiples)
def test_explicit_size_is_cropped_to_multiples_whatever_the_clip(height, width, multiple):
    if min(height, width) >= multiple:
        assert fit_size(1080, 1920, multiple, (height, width)) == (height - height % multiple, width - width % multiple)
