"""Pooling against windows averaged by hand, and the shuffles against their index arithmetic.

B batch, T frames, H W pixels, C channels; float64.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae.layers.resample import AvgPool3d, SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")


def windows(size, kernel, stride, padding, ceil_mode):
    """Lists (start, stop) of the windows along an axis, which begins at -padding and ends at size + padding.

    With ceil_mode one more may reach past the end, if elements are left over and it starts on an element or before.
    """
    end = size + padding
    found = [(start, start + kernel) for start in range(-padding, end - kernel + 1, stride)]
    start = found[-1][0] + stride
    return found + ([(start, end)] if ceil_mode and found[-1][1] < end and start < size else [])


def pooled(x, kernel, stride, padding, ceil_mode, include_pad):
    axes = [windows(*axis, ceil_mode) for axis in zip(x.shape[1:4], kernel, stride, padding, strict=True)]
    y = np.empty((x.shape[0], *map(len, axes), x.shape[4]))
    for position in np.ndindex(*map(len, axes)):
        bounds = [axis[i] for axis, i in zip(axes, position, strict=True)]
        inside = [slice(max(a, 0), min(b, n)) for (a, b), n in zip(bounds, x.shape[1:4], strict=True)]
        values = x[:, *inside].sum(axis=(1, 2, 3))
        counted = bounds if include_pad else [(s.start, s.stop) for s in inside]
        y[:, *position] = values / np.prod([b - a for a, b in counted])
    return y


@st.composite
def pools(draw):
    """Draws a clip's size and the options of a pool that it is large enough for."""
    triples = st.tuples(*[st.integers(1, 4)] * 3)
    kernel, stride = draw(triples), draw(triples)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(draw(st.integers(max(1, k - 2 * p), 6)) for k, p in zip(kernel, padding, strict=True))
    return size, (kernel, stride, padding, draw(st.booleans()), draw(st.booleans()))


@settings(max_examples=30)
@given(pools())
@hypothesis.example(((2, 3, 3), ((2, 1, 1), (3, 1, 1), (1, 0, 0), True, False)))  # a window would see padding alone
@hypothesis.example(((2, 5, 4), ((2, 2, 2), (2, 2, 2), (1, 1, 0), True, False)))
def test_average_pooling_averages_every_window(noise, case):
    size, options = case
    x = noise((2, *size, 3))
    wanted = pooled(np.asarray(x), *options)
    y = AvgPool3d(*options)(x)
    assert y.shape == wanted.shape
    assert np.allclose(y, wanted, rtol=1e-13, atol=1e-13)


def test_averages_by_hand_tell_the_options_apart():
    x = np.arange(5.0).reshape(1, 5, 1, 1, 1)
    size = ((2, 1, 1), (2, 1, 1), (1, 0, 0))
    assert pooled(x, *size, False, True).ravel().tolist() == [0.0, 1.5, 3.5]
    assert pooled(x[:, :4], *size, True, True).ravel().tolist() == [0.0, 1.5, 1.5]
    assert pooled(x[:, :4], *size, True, False).ravel().tolist() == [0.0, 1.5, 3.0]
    assert pooled(x, (2, 1, 1), (3, 1, 1), (0, 0, 0), True, True).ravel().tolist() == [0.5, 3.5]
    assert pooled(x[:, :4], (2, 1, 1), (3, 1, 1), (0, 0, 0), True, True).ravel().tolist() == [0.5, 3.0]
    assert pooled(x[:, :4], (2, 1, 1), (3, 1, 1), (0, 0, 0), False, True).ravel().tolist() == [0.5]


def test_pooling_needs_no_stride_and_averages_in_float32_at_least(noise):
    x = noise((1, 4, 6, 6, 2)).astype(jnp.bfloat16)
    y = AvgPool3d((2, 3, 3))(x)
    wanted = pooled(np.asarray(x, np.float64), (2, 3, 3), (2, 3, 3), (0, 0, 0), False, True)
    assert y.dtype == jnp.bfloat16
    assert jnp.array_equal(y, jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))


def test_impossible_pooling_is_refused(noise):
    with pytest.raises(ValueError, match=r"padding \(0, 1, 2\) must be at most half of the kernel \(3, 3, 3\)"):
        AvgPool3d(3, padding=(0, 1, 2))
    with pytest.raises(ValueError, match="windows of 3 need more than 2 elements with padding 0: use a larger input"):
        AvgPool3d(3)(noise((1, 2, 4, 4, 1)))


def spatial_shuffle(y):
    """Sends channel (c * 2 + p1) * 2 + p2 to row 2h + p1 and column 2w + p2 of channel c."""
    b, t, h, w, channels = y.shape
    out = np.empty((b, t, 2 * h, 2 * w, channels // 4))
    for c, p1, p2 in itertools.product(range(channels // 4), range(2), range(2)):
        out[:, :, p1::2, p2::2, c] = y[..., (c * 2 + p1) * 2 + p2]
    return out


def temporal_shuffle(y):
    """Sends channel c * 2 + p to frame 2t + p of channel c."""
    b, t, h, w, channels = y.shape
    out = np.empty((b, 2 * t, h, w, channels // 2))
    for c, p in itertools.product(range(channels // 2), range(2)):
        out[:, p::2, ..., c] = y[..., c * 2 + p]
    return out


def test_spatial_upsample_deals_channels_to_rows_and_columns(randomized, noise):
    layer, x = randomized(lambda rngs: SpatialUpsample(4, 3, rngs=rngs)), noise((2, 3, 3, 5, 4))
    y = np.asarray(layer.conv(x)[0])
    assert np.array_equal(layer(x)[0], spatial_shuffle(y))
    rows_for_columns = spatial_shuffle(y.swapaxes(2, 3)).swapaxes(2, 3)
    assert not np.allclose(layer(x)[0], rows_for_columns)


def test_temporal_upsample_drops_the_first_frame_of_a_stream_only(randomized, noise):
    layer, x = randomized(lambda rngs: TemporalUpsample(4, 3, rngs=rngs)), noise((2, 3, 3, 5, 4))
    y, carry = layer(x)
    assert np.array_equal(y, temporal_shuffle(np.asarray(layer.conv(x)[0]))[:, 1:])
    later, _ = layer(x, carry)
    assert np.array_equal(later, temporal_shuffle(np.asarray(layer.conv(x, carry)[0])))
    assert (y.shape[1], later.shape[1]) == (5, 6)


def test_averaged_time_begins_with_the_first_frame_alone(noise):
    layer, x = TemporalDownsample(4, use_conv=False, rngs=nnx.Rngs(0)), noise((2, 5, 3, 5, 4))
    y, carry = layer(x)
    assert np.array_equal(y[:, 0], x[:, 0])
    assert np.allclose(y[:, 1:], (x[:, 1::2] + x[:, 2::2]) / 2, rtol=1e-14)
    image, _ = layer(x[:, :1])
    assert np.array_equal(image, x[:, :1])
    assert [leaf.shape[1] for leaf in jax.tree.leaves(carry)] == [0]


def test_odd_frame_waits_in_the_carry_until_its_pair_comes(noise):
    layer, x = TemporalDownsample(4, use_conv=False, rngs=nnx.Rngs(0)), noise((2, 5, 3, 5, 4))
    carry: Any = layer(x[:, :4])[1]
    assert np.array_equal(carry, x[:, 3:4])
    nothing, same = layer(x[:, :0], carry)
    assert nothing.shape[1] == 0
    assert np.array_equal(np.asarray(same), carry)
    pair, _ = layer(x[:, 4:], carry)
    assert np.allclose(pair[:, 0], (x[:, 3] + x[:, 4]) / 2, rtol=1e-14)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda rngs: SpatialDownsample(4, 6, rngs=rngs), (2, 5, 4, 3, 6)),
        (lambda rngs: SpatialDownsample(4, use_conv=False, rngs=rngs), (2, 5, 3, 2, 4)),
        (lambda rngs: TemporalDownsample(4, 6, rngs=rngs), (2, 3, 7, 5, 6)),
        (lambda rngs: TemporalDownsample(4, use_conv=False, rngs=rngs), (2, 3, 7, 5, 4)),
        (lambda rngs: SpatialUpsample(4, rngs=rngs), (2, 5, 14, 10, 4)),
        (lambda rngs: TemporalUpsample(4, 1, rngs=rngs), (2, 9, 7, 5, 1)),
    ],
)
def test_odd_sizes_round_up_by_convolution_and_down_by_pooling(build, shape, randomized, noise):
    assert randomized(build)(noise((2, 5, 7, 5, 4)))[0].shape == shape


def test_pooling_samples_each_second_pixel_pair(noise):
    layer, x = SpatialDownsample(4, use_conv=False, rngs=nnx.Rngs(0)), noise((1, 2, 4, 6, 4))
    quarters = [x[:, :, i::2, j::2] for i in range(2) for j in range(2)]
    assert np.allclose(layer(x)[0], sum(quarters) / 4, rtol=1e-13)


@pytest.mark.parametrize("layer", [SpatialDownsample, TemporalDownsample])
def test_pooling_cannot_change_the_channels(layer):
    with pytest.raises(ValueError, match="keeps 4 channels and cannot give 8: use a convolution"):
        layer(4, 8, use_conv=False, rngs=nnx.Rngs(0))
    assert isinstance(layer(4, 4, use_conv=False, rngs=nnx.Rngs(0)).conv, AvgPool3d)


def test_stream_of_averages_cannot_start_without_a_frame(noise):
    with pytest.raises(ValueError, match="start with at least one frame"):
        TemporalDownsample(4, use_conv=False, rngs=nnx.Rngs(0))(noise((1, 0, 2, 2, 4)))
