"""What a device takes from those before it: the frames that the joined clip has there, however many devices that are.

B batch, T frames, H W pixels, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vae.layers.time_halo import TimeHalo, frames_before

hypothesis = pytest.importorskip("hypothesis", reason="devices, frames and carries are drawn by hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
BATCH, PIXEL = 2, (1, 2, 3)


def numbered(start, frames):
    """Returns frames (B, T, H, W, C) of a clip, from a place of it on, no value of which is there twice."""
    size = np.prod(PIXEL)
    values = np.arange(start, start + frames)[None, :, None] * size + np.arange(size)
    clips = 1e6 * np.arange(BATCH)[:, None, None]
    return (values + clips).reshape(BATCH, frames, *PIXEL).astype(np.float32)


@settings(max_examples=30)
@given(devices=st.integers(1, 6), frames=st.integers(1, 5), count=st.integers(0, 9))
@hypothesis.example(devices=4, frames=1, count=2)
@hypothesis.example(devices=2, frames=1, count=7)
@hypothesis.example(devices=3, frames=2, count=5)
def test_frames_before_those_of_a_device_are_those_of_the_joined_clip(devices, frames, count):
    clip = numbered(0, count + devices * frames)
    held = [clip[:, count + place * frames :][:, :frames] for place in range(devices)]
    expected = [clip[:, place * frames :][:, :count] for place in range(devices)]
    carry = TimeHalo(jnp.asarray(np.concatenate([clip[:, :count]] * devices)), devices)
    np.testing.assert_array_equal(jax.jit(frames_before)(carry, np.concatenate(held)), np.concatenate(expected))
