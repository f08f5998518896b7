"""Arithmetic of sizes and padding, against counting by hand and against numpy's padding."""

import re

import jax
import numpy as np
import pytest

from flax_vae.ops.geometry import (
    MIN_PIXELS_PER_STEP,
    causal_padding,
    conv_output_size,
    frame_steps,
    lax_padding,
    triple,
)

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies
sizes, steps = st.integers(1, 40), st.integers(1, 5)


@given(sizes, st.integers(1, 7), steps, st.tuples(st.integers(0, 6), st.integers(0, 6)), steps)
def test_output_size_counts_the_positions_of_the_window(size, kernel, stride, padding, dilation):
    length = padding[0] + size + padding[1]
    taps = np.arange(kernel) * dilation
    positions = [start for start in range(0, length, stride) if start + taps[-1] < length]
    if positions:
        assert conv_output_size(size, kernel, stride, padding, dilation) == len(positions)
    else:
        with pytest.raises(ValueError, match=f"spans {taps[-1] + 1} elements, but {size} .* use a larger input"):
            conv_output_size(size, kernel, stride, padding, dilation)


@given(sizes, st.integers(1, 7), st.sampled_from([1, 3, 5, 7]), steps, steps)
def test_causal_padding_rounds_sizes_up_and_puts_all_of_time_in_front(size, kernel_time, kernel_side, stride, dilation):
    time, height, width = causal_padding((kernel_time, kernel_side, 1), dilation)
    assert time == (dilation * (kernel_time - 1), 0)
    assert height == (kernel_side // 2, kernel_side // 2)
    assert width == (0, 0)
    assert conv_output_size(size, kernel_time, stride, time, dilation) == -(-size // stride)
    assert conv_output_size(size, kernel_side, stride, height) == -(-size // stride)


def test_only_the_dilation_of_time_pads():
    assert causal_padding(3, (2, 4, 4)) == ((4, 0), (1, 1), (1, 1))
    assert causal_padding((5, 3, 1)) == ((4, 0), (1, 1), (0, 0))


def test_one_number_stands_for_three():
    assert triple(3) == (3, 3, 3)
    assert triple([1, 2, 3]) == (1, 2, 3)


@pytest.mark.parametrize("value", [(1, 2), (1, 2, 3, 4), ()])
def test_two_or_four_numbers_do_not_stand_for_three(value):
    with pytest.raises(ValueError, match="one integer or three .*" + re.escape(str(value))):
        triple(value)


def pad_like_torch(x, torch_pad):
    """Pads, or crops where negative, the last axis first."""
    for axis, before, after in zip(range(x.ndim)[::-1], torch_pad[::2], torch_pad[1::2], strict=False):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (max(before, 0), max(after, 0))
        x = np.pad(x, widths)
        x = np.take(x, range(max(-before, 0), x.shape[axis] - max(-after, 0)), axis)
    return x


@st.composite
def pads(draw):
    """Draws a shape, a tuple for torch's F.pad that crops no axis away, and an order of the axes."""
    shape = draw(st.lists(st.integers(3, 5), min_size=1, max_size=5))
    pairs = draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), max_size=len(shape)))
    return shape, [n for pair in pairs for n in pair], draw(st.permutations(range(len(shape))))


@hypothesis.settings(max_examples=30)
@given(pads())
def test_lax_padding_pads_and_crops_as_torch_would(case):
    shape, torch_pad, order = case
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = pad_like_torch(x, torch_pad)
    zero = np.float32(0)
    assert np.array_equal(jax.lax.pad(x, zero, lax_padding(torch_pad, x.ndim)), expected)
    reordered = jax.lax.pad(x.transpose(order), zero, lax_padding(torch_pad, x.ndim, order))
    assert np.array_equal(reordered, expected.transpose(order))


def test_torch_pads_of_a_clip_land_on_our_axes():
    pad = (1, 2, 3, 4, 5, 0)  # width, height and frames of B C T H W
    assert lax_padding(pad, 5, (0, 2, 3, 4, 1)) == ((0, 0, 0), (5, 0, 0), (3, 4, 0), (1, 2, 0), (0, 0, 0))


def test_impossible_torch_pads_are_refused():
    with pytest.raises(ValueError, match=r"at most 5 axes, got 3 numbers: \(1, 1, 1\)"):
        lax_padding((1, 1, 1), 5)
    with pytest.raises(ValueError, match="at most 2 axes, got 6 numbers"):
        lax_padding((1,) * 6, 2)
    for order in ((0, 1), (0, 0, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"permutation of the 3 axes, got \(" + str(order)[1:-1]):
            lax_padding((1, 1), 3, order)


@given(st.integers(1, 200), st.integers(1, 3 * MIN_PIXELS_PER_STEP))
def test_steps_take_every_frame_and_none_is_empty(frames, pixels):
    steps, size = frame_steps(frames, pixels)
    assert (steps - 1) * size < frames <= steps * size
    assert (size - 1) * pixels < MIN_PIXELS_PER_STEP  # no more frames than it takes
    assert steps == 1 or 2 * size * pixels > MIN_PIXELS_PER_STEP
