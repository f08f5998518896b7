"""Frames cut into strips give what whole frames give: latents, video, gradients and streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_vae.families.pyramid import CausalVideoVAE, MidBlock
from flax_vae.layers.attention import Attention
from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.resample import SpatialDownsample, SpatialUpsample
from flax_vae.layers.sequence import Execution
from flax_vae.layers.strips import Strips, frames_in_strips, shared_by_tpus, strips_for
from tests.little import CONFIG

LAYERS = {
    "conv": lambda: CausalConv3d(4, 6, 3, rngs=nnx.Rngs(0)),
    "conv-5x7": lambda: CausalConv3d(4, 6, (2, 5, 7), rngs=nnx.Rngs(0)),
    "norm": lambda: CausalGroupNorm(2, 4, rngs=nnx.Rngs(0)),
    "attention": lambda: Attention(4, 2, rngs=nnx.Rngs(0)),
    "mid": lambda: MidBlock(4, 2, rngs=nnx.Rngs(0)),
    "down": lambda: SpatialDownsample(4, rngs=nnx.Rngs(0)),
    "up": lambda: SpatialUpsample(4, rngs=nnx.Rngs(0)),
}


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape))


def output(layer, x):
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def with_gradients(function, state, x, dy):
    y, pull = jax.vjp(function, state, x)
    return y, pull(dy)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *(pytest.param(name, Strips(2, 4), id=f"{name}-rows") for name in LAYERS),
        *(
            pytest.param(
                name, Strips(3, 2), id=f"{name}-columns", marks=[pytest.mark.slow] * (name in ("mid", "up", "conv-5x7"))
            )
            for name in LAYERS
        ),
    ],
)
def test_layer_gives_in_strips_what_it_gives_of_whole_frames(name, cut):
    with jax.enable_x64(True):
        structure, state = nnx.split(LAYERS[name]())
        state = jax.tree.map(lambda leaf: drawn(*leaf.shape), state)
        x = drawn(2, 3, 16, 12, 4)

        def whole(state, x):
            return output(nnx.merge(structure, state), x)

        def in_strips(state, x):
            with frames_in_strips(cut):
                return cut.join(output(nnx.merge(structure, state), cut.cut(x)))

        dy = drawn(*jax.eval_shape(whole, state, x).shape)
        actual, expected = (
            jax.tree.leaves(jax.jit(with_gradients, static_argnums=0)(function, state, x, dy))
            for function in (in_strips, whole)
        )
        largest = max(np.abs(each).max() for each in expected)  # keys' biases have gradients of 0 but for rounding
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * largest)


def test_without_its_neighbours_a_strip_is_another_picture():
    layer, x, cut = LAYERS["conv"](), drawn(1, 3, 16, 12, 4).astype(jnp.float32), Strips(2, 4)
    apart = cut.join(layer(cut.cut(x))[0])
    assert np.abs(apart - layer(x)[0]).max() > 1e-3


@pytest.mark.parametrize("frame_by_frame", [False, True])
def test_model_cuts_frames_where_tpus_compute_unless_frame_by_frame(frame_by_frame):
    vae = CausalVideoVAE(CONFIG, rngs=nnx.Rngs(0))
    vae.execution = Execution(frame_by_frame=frame_by_frame)
    with shared_by_tpus(1):
        text = str(jax.make_jaxpr(lambda video: vae.encode(video).mean)(jnp.zeros((2, 17, 32, 24, 3))))
    assert ("f32[8,17,8,24,4]" in text) != frame_by_frame  # two clips, four strips each


@pytest.mark.slow
@pytest.mark.parametrize("frame_by_frame", [False, True])
def test_model_gives_the_same_where_tpus_compute(frame_by_frame, jit):
    with jax.enable_x64(True):
        structure, state = nnx.split(CausalVideoVAE(CONFIG, rngs=nnx.Rngs(0)))
        state = jax.tree.map(lambda leaf: 3 * leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, state)
        vae = nnx.merge(structure, state)
        vae.execution = Execution(frame_by_frame=frame_by_frame)
        video = drawn(2, 17, 32, 24, 3)

        def coded(vae, video):
            latents = vae.encode(video, chunk=8).mean
            first, carry = vae.decode_chunk(latents[:, :2])
            rest, _ = vae.decode_chunk(latents[:, 2:], carry)
            return latents, jnp.concatenate([first, rest], axis=1)

        expected = jit(coded, vae)(video)
        with shared_by_tpus(1):
            actual = jit(coded, vae)(video)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


@settings(max_examples=8)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([2, 3]),
)
def test_joined_strips_are_the_frames(batch, frames, count, rows, columns, axis):
    size = [rows, columns]
    size[axis - 2] *= count
    x, cut = np.arange(batch * frames * size[0] * size[1] * 2).reshape(batch, frames, *size, 2), Strips(axis, count)
    assert cut.cut(jnp.asarray(x)).shape[0] == batch * count
    np.testing.assert_array_equal(cut.join(cut.cut(jnp.asarray(x))), x)


@pytest.mark.parametrize(
    ("devices", "batch", "size", "expected"),
    [
        (1, 1, (256, 256), Strips(2, 8)),
        (16, 16, (256, 256), Strips(2, 8)),
        (1, 4, (256, 256), Strips(2, 2)),
        (1, 8, (256, 256), Strips(2, 1)),
        (1, 1, (720, 1280), Strips(3, 8)),
        (1, 1, (24, 20), Strips(2, 1)),
        (0, 1, (256, 256), Strips(2, 1)),
        (None, 1, (256, 256), Strips(2, 1)),
    ],
)
def test_eight_strips_a_tpu_are_cut_where_they_fit(devices, batch, size, expected):
    with shared_by_tpus(devices):
        assert strips_for(batch, size, 8) == expected


def test_what_strips_cannot_pad_is_refused():
    cut, x = Strips(2, 8), drawn(8, 3, 1, 4, 4).astype(jnp.float32)
    with frames_in_strips(cut):
        with pytest.raises(ValueError, match="strips of 1 rows cannot be padded by 2 and 2: cut frames into fewer"):
            CausalConv3d(4, 4, (1, 5, 1), rngs=nnx.Rngs(0))(x)
        with pytest.raises(ValueError, match="gives 30 rows of 32 cannot be computed in 8 strips: cut none"):
            CausalConv3d(4, 4, (1, 3, 3), dilation=2, rngs=nnx.Rngs(0))(jnp.zeros((8, 3, 4, 4, 4)))
        with pytest.raises(ValueError, match="replicate padding cannot be computed in strips"):
            CausalConv3d(4, 4, (1, 3, 3), pad_mode="replicate", rngs=nnx.Rngs(0))(x)
