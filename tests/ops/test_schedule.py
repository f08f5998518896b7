"""What a compiled program keeps, and what it computes once."""

import jax
import pytest
from flax import nnx

from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.resnet import norm_silu_conv
from flax_vae.ops import winograd
from flax_vae.ops.schedule import materialize_on_cpu
from tests.compiled import memory


def test_what_a_carry_is_cut_from_is_computed_once(randomized):
    layers = randomized(lambda rngs: nnx.List([CausalGroupNorm(4, 16, rngs=rngs), CausalConv3d(16, 16, 3, rngs=rngs)]))
    x = jax.ShapeDtypeStruct((1, 17, 32, 32, 16), "float32")
    with_carry, without = (
        memory(jax.jit(run).lower(x).compile())
        for run in (
            lambda x: norm_silu_conv(tuple(layers), x, None),
            lambda x: norm_silu_conv(tuple(layers), x, None)[0],
        )
    )
    assert with_carry.output_size_in_bytes > without.output_size_in_bytes
    assert with_carry.temp_size_in_bytes < 1.01 * without.temp_size_in_bytes


def test_winograds_products_share_no_clip_of_zeros_that_each_copies():
    x, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 17, 32, 32, 16), (3, 3, 3, 16, 16)))

    def temporaries(count):
        def chain(x, kernel):
            for _ in range(count):
                x = winograd.convolve(x, kernel, ((1, 1), (1, 1)))
            return x

        return memory(jax.jit(chain).lower(x, kernel).compile()).temp_size_in_bytes

    assert temporaries(2) < temporaries(1) + 0.2 * x.size * x.dtype.itemsize


@pytest.mark.parametrize(("platform", "waits"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_a_cpu_is_kept_from_computing_again(platform, waits):
    text = (
        jax.jit(materialize_on_cpu).trace(jax.ShapeDtypeStruct((3,), "float32")).lower(lowering_platforms=(platform,))
    )
    assert ("optimization_barrier" in text.as_text()) == waits
