"""All ways of computing a convolution give the same, and so do the gradients of their gradients."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_vae.layers.conv import CausalConv3d
from flax_vae.ops import lowering, per_frame, winograd
from flax_vae.ops.window import Window, lowered
from tests.slow import some_slow

convolve: Any = lowering.convolve  # types do not see through jax.custom_vjp
kernel_gradient: Any = lowering.kernel_gradient
CAUSAL = ((2, 0), (1, 1), (1, 1))
CASES: dict[str, Any] = {
    "causal": ((3, 3, 3), (1, 1, 1), CAUSAL, (1, 1, 1)),
    "carried": ((3, 3, 3), (1, 1, 1), ((0, 0), (1, 1), (1, 1)), (1, 1, 1)),
    "before-the-end": ((3, 3, 3), (1, 1, 1), ((0, 2), (1, 1), (1, 0)), (1, 1, 1)),
    "frames-of-odd-size": ((1, 3, 3), (1, 1, 1), ((0, 0), (0, 2), (1, 2)), (1, 1, 1)),
    "spatial-down": ((3, 3, 3), (1, 2, 2), CAUSAL, (1, 1, 1)),
    "temporal-down": ((3, 3, 3), (2, 1, 1), CAUSAL, (1, 1, 1)),
    "down-by-2-and-3": ((2, 5, 3), (3, 2, 3), ((1, 2), (2, 1), (0, 3)), (1, 1, 1)),
    "dilated": ((3, 3, 2), (2, 1, 1), ((4, 0), (2, 2), (1, 0)), (2, 2, 1)),
    "of-frames": ((1, 4, 4), (1, 2, 2), ((0, 0), (1, 1), (1, 1)), (1, 1, 1)),
    "longer-than-the-clip": ((7, 3, 1), (1, 1, 1), ((6, 0), (1, 1), (0, 0)), (1, 1, 1)),
    "leaves-the-end": ((3, 3, 3), (2, 2, 2), ((0, 0), (0, 0), (0, 0)), (1, 1, 1)),
}


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def gradients(window: Window, x: jax.Array, kernel: jax.Array) -> Any:
    """Gives the output, its gradients, and the gradients of those."""
    y, pull = jax.vjp(lambda *inputs: convolve(*inputs, window), x, kernel)
    dy = drawn(*y.shape)

    def squares(*inputs):
        _, pull = jax.vjp(lambda *pair: convolve(*pair, window), *inputs[:2])
        return sum(jnp.square(gradient).sum() for gradient in pull(inputs[2]))

    return y, pull(dy), jax.grad(squares, (0, 1, 2))(x, kernel, dy)


LOWERINGS = [(lowering, name, (3, 4)) for lowering in ("per_frame", "stacked") for name in CASES]
LOWERINGS += [("winograd", "causal", (3, 4))]
LOWERINGS += [
    pytest.param("winograd", name, (3, 4), marks=pytest.mark.slow)
    for name in ("carried", "before-the-end", "frames-of-odd-size")
]
# fewer inputs, of all time taps together, than outputs
LOWERINGS += [("per_frame", name, (1, 8)) for name in ("causal", "down-by-2-and-3")]
LOWERINGS += [
    pytest.param("per_frame", name, (1, 8), marks=pytest.mark.slow)
    for name in ("before-the-end", "dilated", "longer-than-the-clip")
]


@pytest.mark.parametrize(("lowering", "name", "channels"), LOWERINGS)
def test_each_lowering_gives_what_xla_gives(lowering, name, channels):
    size, *rest = CASES[name]
    x, kernel = drawn(2, 5, 7, 6, channels[0]), drawn(*size, *channels)
    ours, xlas = (
        jax.jit(gradients, static_argnums=0)(Window(*rest, lowering=each), x, kernel) for each in (lowering, "plain")
    )
    for actual, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", some_slow(CASES, CASES.keys() - {"causal", "carried", "down-by-2-and-3", "dilated"}))
def test_large_frames_give_what_xla_gives(name, monkeypatch):
    monkeypatch.setattr(
        per_frame, "CACHE_PIXELS", 20
    )  # frames one by one, gradients by the kernel in blocks of their rows
    size, *rest = CASES[name]
    x, kernel = drawn(1, 5, 11, 6, 3), drawn(*size, 3, 4)  # a shape of this test: programs are kept by shape
    ours, xlas = (gradients(Window(*rest, lowering=each), x, kernel) for each in ("per_frame", "plain"))
    for actual, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_frames_are_lowered_by_2d_convolutions_and_matmuls():
    window = Window((1, 1, 1), CAUSAL, lowering="per_frame")
    text = str(
        jax.make_jaxpr(lambda x, kernel: gradients(window, x, kernel))(drawn(1, 4, 5, 6, 3), drawn(3, 3, 3, 3, 2))
    )
    assert "conv_general_dilated" in text
    assert "spatial_dims=(1, 2, 3)" not in text


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        ((3, 3, 3, 2, 4), Window((1, 1, 1), CAUSAL, groups=2, lowering="per_frame")),
        ((1, 1, 1, 4, 4), Window((1, 2, 2), ((0, 0), (0, 0), (0, 0)), lowering="per_frame")),
        ((3, 3, 3, 4, 4), Window((1, 2, 2), CAUSAL, (1, 2, 2), lowering="per_frame")),
        ((9, 3, 3, 4, 4), Window((1, 1, 1), ((0, 0), (1, 1), (1, 1)), lowering="per_frame")),
    ],
    ids=["groups", "stride-longer-than-kernel", "dilated-with-stride", "no-output"],
)
def test_what_does_not_suit_frames_is_left_to_xla(kernel, window):
    x, kernel = drawn(1, 5, 6, 7, 4), drawn(*kernel)
    text = str(jax.make_jaxpr(lambda *inputs: convolve(*inputs, window))(x, kernel))
    assert "rhs_spec=(4, 3, 0, 1, 2)" in text
    assert convolve(x, kernel, window).shape[1:4] == window.output_size(x.shape[1:4], kernel.shape)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 9)] * 3),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
)
def test_shapes_of_any_window(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any):
    window = Window(stride, padding, dilation, lowering="per_frame")
    x, weights = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32), jax.ShapeDtypeStruct((*kernel, 3, 4), jnp.float32)
    y, gradients = jax.eval_shape(
        lambda *inputs: (
            convolve(*inputs, window),
            jax.grad(lambda *pair: convolve(*pair, window).sum(), (0, 1))(*inputs),
        ),
        x,
        weights,
    )
    assert y.shape == (2, *window.output_size(size, kernel), 4)
    assert [gradient.shape for gradient in gradients] == [x.shape, weights.shape]


def test_sums_of_bfloat16_are_taken_in_float32():
    x, kernel = drawn(1, 6, 8, 8, 64).astype(jnp.bfloat16), drawn(3, 3, 3, 64, 8).astype(jnp.bfloat16)
    window = Window((1, 1, 1), CAUSAL, lowering="per_frame")
    y = convolve(x, kernel, window)
    dkernel = kernel_gradient(x, y, window, (3, 3, 3))
    assert (y.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16)
    wide = convolve(*(value.astype(jnp.float32) for value in (x, kernel)), window)
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def test_a_layer_takes_the_lowering_that_it_is_traced_in():
    layer, x = CausalConv3d(3, 4, 3, rngs=nnx.Rngs(0)), drawn(1, 4, 5, 6, 3)
    with lowered("winograd"):
        products = str(jax.make_jaxpr(lambda x: layer(x)[0])(x))
    plain = str(jax.make_jaxpr(lambda x: layer(x)[0])(x))
    assert ("dot_general" in products, "conv_general_dilated" in products) == (True, False)
    assert ("dot_general" in plain, "conv_general_dilated" in plain) == (False, True)


@pytest.mark.parametrize(
    ("shape", "channels", "is_winograds"),
    [
        ((1, 9, 64, 64), 64, True),
        ((1, 9, 64, 64), 32, False),
        ((1, 3, 16, 16), 256, False),
        ((1, 3, 64, 64), 64, False),
    ],
    ids=["enough", "few-channels", "few-tiles", "few-frames"],
)
def test_winograds_products_are_taken_where_they_pay(shape, channels, is_winograds):
    x = jax.ShapeDtypeStruct((*shape, channels), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, channels, channels), jnp.float32)
    window = Window((1, 1, 1), ((0, 0), (1, 1), (1, 1)))
    text = str(jax.make_jaxpr(lambda *inputs: convolve(*inputs, window))(x, kernel))
    assert ("dot_general" in text) == is_winograds


@pytest.mark.parametrize(("size", "products"), [(64, 16), (128, 3)])
def test_winograds_products_give_kernels_gradients_of_frames_that_are_not_large(size, products):
    x = jax.ShapeDtypeStruct((1, 5, size, size, 64), jnp.float32)
    window = Window((1, 1, 1), CAUSAL)
    text = str(jax.make_jaxpr(lambda x, dy: kernel_gradient(x, dy, window, (3, 3, 3)))(x, x))
    assert text.count("dot_general[") == products


@pytest.mark.parametrize(("channels", "convolutions"), [(3, 1), (33, 1), (34, 3)])
def test_taps_are_one_convolution_of_their_inputs_while_these_are_few(channels, convolutions):
    x = jax.ShapeDtypeStruct((1, 5, 8, 8, channels), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, channels, 128), jnp.float32)
    window = Window((1, 1, 1), CAUSAL, lowering="per_frame")
    text = str(jax.make_jaxpr(lambda *inputs: convolve(*inputs, window))(x, kernel))
    assert text.count("conv_general_dilated[") == convolutions


def test_large_frames_are_convolved_one_by_one():
    def convolutions(size):
        x = jax.ShapeDtypeStruct((1, 5, size, size, 32), jnp.float32)
        kernel = jax.ShapeDtypeStruct((3, 3, 3, 32, 32), jnp.float32)
        window = Window((1, 1, 1), CAUSAL, lowering="per_frame")
        return str(jax.make_jaxpr(lambda *inputs: convolve(*inputs, window))(x, kernel)).count("conv_general_dilated[")

    assert (convolutions(64), convolutions(72)) == (1, 5)


@pytest.mark.parametrize("backwards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frames_in_blocks_of_rows_give_what_whole_ones_give(monkeypatch, backwards):
    x, kernel, padding = drawn(2, 3, 21, 12, 3), drawn(3, 3, 3, 3, 4), ((1, 1), (0, 2))
    whole = winograd.convolve(x, kernel, padding, backwards)
    monkeypatch.setattr(winograd, "CACHE_TILES", 30)
    assert winograd.blocks_of_rows(2, 11, 6, 15) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 11)]
    np.testing.assert_allclose(
        winograd.convolve(x, kernel, padding, backwards), whole, rtol=0, atol=2e-6 * np.abs(whole).max()
    )


@given(
    batch=st.integers(1, 3), rows=st.integers(1, 200), columns=st.integers(1, 200), channels=st.sampled_from([9, 4096])
)
def test_blocks_of_rows_hold_every_tile_once(batch, rows, columns, channels):
    blocks, tiles = winograd.blocks_of_rows(batch, rows, columns, channels), 1000 if channels == 9 else 125
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    assert len(blocks) <= winograd.MAX_BLOCKS
    largest = max(block.stop - block.start for block in blocks) - 1  # rows are not cut
    assert largest * batch * columns <= max(1.5 * tiles, batch * rows * columns / winograd.MAX_BLOCKS)


@pytest.mark.parametrize(
    ("platform", "kernel", "axes"),
    [("cuda", 3, 2), ("cuda", 1, 2), ("rocm", 3, 3), ("tpu", 3, 3), ("tpu", 1, 2), ("cpu", 3, 2)],
)
def test_what_each_platform_computes_as_images(platform, kernel, axes):
    x, weights = jax.ShapeDtypeStruct((1, 5, 32, 32, 48), jnp.bfloat16), (kernel, 3, 3, 48, 48)
    window = Window((1, 1, 1), ((kernel - 1, 0), (1, 1), (1, 1)))

    def gradients(x, kernel):
        return jax.vjp(lambda *pair: convolve(*pair, window), x, kernel)[1](x)

    program = jax.jit(gradients).trace(x, jax.ShapeDtypeStruct(weights, jnp.bfloat16))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert {dims.count(",") for dims in re.findall(r"dim_numbers = \[([^]]*)\]", text)} == {axes + 1}


def test_gradients_that_are_not_jitted_are_compiled_once():
    window, x, kernel = Window((1, 1, 1), CAUSAL), drawn(1, 4, 5, 6, 3), drawn(3, 3, 3, 3, 2)
    program: Any = lowering._lowered
    compiled = []
    for _ in range(2):
        jax.grad(lambda *pair: convolve(*pair, window).sum(), (0, 1))(x, kernel)
        compiled.append(program._cache_size())
    assert compiled[0] == compiled[1] > 0
