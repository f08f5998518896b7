"""The port: torch's names and axis orders, a bijection or an error that lists everything, bit for bit both ways."""

import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.families.pyramid import narrow, old_keys
from flax_vae.io import port
from flax_vae.layers.attention import Attention, Linear
from flax_vae.layers.conv import CausalConv3d, Conv3d
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.resnet import CausalResnetBlock

hypothesis = pytest.importorskip("hypothesis", reason="names are drawn by hypothesis: pip install hypothesis")
given, st = hypothesis.given, hypothesis.strategies

DTYPES = ["float64", "float32", "float16", "bfloat16"]
RESNET_SHAPES = {
    "norm1.weight": (4,),
    "norm1.bias": (4,),
    "conv1.conv.weight": (6, 4, 3, 3, 3),
    "conv1.conv.bias": (6,),
    "norm2.weight": (6,),
    "norm2.bias": (6,),
    "conv2.conv.weight": (6, 6, 3, 3, 3),
    "conv2.conv.bias": (6,),
    "conv_shortcut.conv.weight": (6, 4, 1, 1, 1),
    "conv_shortcut.conv.bias": (6,),
}


def resnet(**kwargs):
    return CausalResnetBlock(4, 6, num_groups=2, **kwargs, rngs=nnx.Rngs(0))


def attention():
    return Attention(6, num_groups=3, rngs=nnx.Rngs(0))


def random_tensors(module, seed=0, dtype="float32") -> dict[str, np.ndarray]:
    shapes = port.named_tensors(module).shapes()
    generator = np.random.default_rng(seed)
    return {key: generator.standard_normal(shape).astype(dtype) for key, (shape, _) in shapes.items()}


def values(module) -> dict:
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy where jax takes memory as it is."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Unreadable(port.Arrays):
    def read(self, key):
        raise AssertionError(f"{key} was read before all names and shapes were checked")


def refusal(module, tensors, dtype=jnp.float32) -> str:
    with pytest.raises(ValueError) as caught:
        port.load(module, Unreadable(tensors), dtype)
    return str(caught.value)


def test_keys_and_shapes_are_torchs():
    assert {key: shape for key, (shape, _) in port.named_tensors(resnet()).shapes().items()} == RESNET_SHAPES


def test_full_model_has_the_released_tensors():
    vae = nnx.eval_shape(lambda: CausalVideoVAE(CausalVideoVAEConfig.released(), rngs=nnx.Rngs(0)))
    shapes = {key: parameter.torch_shape for key, parameter in port.parameters(vae).items()}
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (260, 335_402_067)
    assert shapes["encoder.down_blocks.0.temporal_downsamplers.0.conv.conv.weight"] == (128, 128, 3, 3, 3)
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight"] == (256, 128, 1, 1, 1)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["decoder.up_blocks.0.temporal_upsamplers.0.conv.conv.weight"] == (1024, 512, 3, 3, 3)
    assert shapes["quant_conv.conv.bias"] == (32,)


def test_loaded_convolution_multiplies_torchs_kernel():
    conv = Conv3d(4, 6, (2, 3, 5), groups=2, rngs=nnx.Rngs(0))
    weights = random_tensors(conv, seed=1)
    port.load(conv, port.Arrays(weights))
    x = np.random.default_rng(2).standard_normal((1, 2, 3, 5, 4)).astype(np.float32)
    groups = x[0].reshape(2, 3, 5, 2, 2), weights["weight"].reshape(2, 3, 2, 2, 3, 5)
    expected = np.einsum("thwgi,goithw->go", *groups).reshape(6) + weights["bias"]
    np.testing.assert_allclose(conv(jnp.asarray(x)).reshape(6), expected, rtol=1e-5)


def test_loaded_linear_and_norm_compute_what_torchs_do():
    linear, norm = Linear(3, 5, rngs=nnx.Rngs(0)), CausalGroupNorm(1, 3, rngs=nnx.Rngs(0))
    weights, scales = random_tensors(linear, seed=1), random_tensors(norm, seed=2)
    port.load(linear, port.Arrays(weights))
    port.load(norm, port.Arrays(scales))
    x = np.random.default_rng(3).standard_normal((1, 1, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(linear(jnp.asarray(x)), x @ weights["weight"].T + weights["bias"], rtol=1e-5)
    normal = (x - x.mean()) / x.std()
    np.testing.assert_allclose(norm(jnp.asarray(x)), normal * scales["weight"] + scales["bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [resnet, attention])
def test_round_trip_keeps_every_bit(make, dtype):
    generator = np.random.default_rng(0)
    shapes = port.named_tensors(make()).shapes()
    bits = {key: generator.bytes(math.prod(shape) * np.dtype(dtype).itemsize) for key, (shape, _) in shapes.items()}
    before = {key: np.frombuffer(bits[key], dtype).reshape(shapes[key][0]) for key in bits}  # NaNs and subnormals too
    with jax.enable_x64(dtype == "float64"):
        module = nnx.eval_shape(make)
        port.load(module, port.Arrays(before), dtype)
        after = port.torch_layout(module)
    assert {key: array.dtype.name for key, array in after.items()} == dict.fromkeys(before, dtype)
    assert {key: array.tobytes() for key, array in after.items()} == bits


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_weights_are_cast_to_the_dtype_asked_for(stored, asked):
    weights = random_tensors(attention(), dtype=stored)
    module = nnx.eval_shape(attention)
    port.load(module, port.Arrays(weights), asked)
    after = port.torch_layout(module)
    assert all(np.array_equal(after[key], weights[key].astype(asked)) for key in weights)


def test_concrete_module_does_not_see_later_changes_of_the_source():
    module, weights = attention(), {k: aligned(array) for k, array in random_tensors(attention()).items()}
    port.load(module, port.Arrays(weights))
    before = values(module)
    copies = {key: array.copy() for key, array in before.items()}
    for array in weights.values():
        array[...] = 7.0
    assert all(np.array_equal(copies[key], array) for key, array in values(module).items())


def test_tensors_are_read_once_each_and_made_only_when_read():
    read = []

    class Counting(port.Arrays):
        def read(self, key):
            read.append(key)
            return super().read(key)

    port.load(resnet(), Counting(random_tensors(resnet())))
    assert sorted(read) == sorted(RESNET_SHAPES)
    tensors = port.named_tensors(nnx.eval_shape(resnet))  # has no values to make tensors of
    assert tensors.shapes()["conv1.conv.weight"] == ((6, 4, 3, 3, 3), "float32")


def test_everything_that_is_wrong_is_listed_at_once():
    weights = random_tensors(resnet())
    del weights["norm1.bias"], weights["conv2.conv.weight"]
    weights["extra.weight"] = np.zeros((2, 3), np.float32)
    weights["conv1.conv.weight"] = weights["conv1.conv.weight"].transpose(2, 3, 4, 1, 0)
    weights["norm2.weight"] = weights["norm2.weight"].astype(np.int64)
    weights["module.norm2.bias"] = weights["norm2.bias"]
    lines = refusal(nnx.eval_shape(resnet), weights).splitlines()
    assert "CausalResnetBlock" in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == [
        "missing: conv2.conv.weight (6, 6, 3, 3, 3)",
        "missing: norm1.bias (4,)",
        "unexpected: extra.weight (2, 3)",
        "unexpected: module.norm2.bias (6,)",
        "wrong dtype: norm2.weight is int64, expected one of float64, float32, float16, bfloat16",
        "wrong shape: conv1.conv.weight is (3, 3, 3, 4, 6), expected (6, 4, 3, 3, 3)",
    ]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "float8_e4m3fn"])
def test_dtypes_that_are_no_weights_are_refused_by_name(dtype):
    weights = random_tensors(attention())
    weights["to_q.weight"] = weights["to_q.weight"].astype(dtype)
    assert f"to_q.weight is {dtype}" in refusal(attention(), weights)
    assert f"got {dtype}" in refusal(attention(), random_tensors(attention()), np.dtype(dtype))


def test_float64_is_refused_where_jax_would_make_it_float32():
    assert "jax_enable_x64" in refusal(attention(), random_tensors(attention(), dtype="float64"), jnp.float64)


def test_values_too_large_for_the_dtype_are_refused_by_name():
    weights = random_tensors(attention())
    weights["to_k.weight"][2, 1] = 1e6
    with pytest.raises(ValueError, match=r"to_k\.weight .*float16"):
        port.load(attention(), port.Arrays(weights), jnp.float16)
    weights["to_k.weight"][2, 1] = np.inf  # what was infinite before may stay so
    port.load(attention(), port.Arrays(weights), jnp.float16)


@pytest.mark.parametrize("prefix", ["module.", "vae.", "module.vae.", "vae.module."])
def test_prefixed_weights_load(prefix):
    weights = random_tensors(resnet())
    module = resnet()
    port.load(module, port.Arrays({prefix + key: array for key, array in weights.items()}))
    assert all(np.array_equal(array, weights[key]) for key, array in port.torch_layout(module).items())


@pytest.mark.parametrize("outer", ["", "module."])
def test_losses_of_a_training_checkpoint_are_left_out_but_only_there(outer):
    weights = random_tensors(resnet())
    loss = {f"{outer}loss.discriminator.main.0.weight": np.zeros((2, 3), np.int64)}
    port.load(resnet(), port.Arrays({f"{outer}vae.{key}": array for key, array in weights.items()} | loss))
    assert "unexpected: " + next(iter(loss)) in refusal(resnet(), weights | loss)


class OldAttention(nnx.Module):
    """Attention in the layouts of a Pyramid model."""

    layouts: ClassVar = CausalVideoVAE.layouts

    def __init__(self):
        self.mid = attention()


def old_export(weights: dict, shape=lambda array: array.shape) -> dict:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"to_(?:[qkv]|out\.0)", lambda found: names[found[0]], key): array for key, array in weights.items()}
    return {key: array.reshape(shape(array)) for key, array in old.items()}


@pytest.mark.parametrize("as_conv", [False, True])
def test_old_attention_exports_load_as_linear_or_as_1x1_convolution(as_conv):
    weights, module = random_tensors(OldAttention()), OldAttention()
    old = old_export(weights, lambda array: (*array.shape, 1, 1) if as_conv and array.ndim == 2 else array.shape)
    assert sorted(old)[2:4] == ["mid.key.bias", "mid.key.weight"]
    assert port.match(module, port.Arrays(old).shapes())["mid.to_k.bias"] == "mid.key.bias"
    port.load(module, port.Arrays(old))
    assert all(np.array_equal(array, weights[key]) for key, array in port.torch_layout(module).items())


def test_old_attention_names_are_those_of_the_family_alone():
    problems = refusal(attention(), old_export(random_tensors(attention())))
    assert "missing: to_q.weight (6, 6)" in problems
    assert "unexpected: query.weight (6, 6)" in problems


def test_problems_are_those_against_the_layout_that_fits_best():
    old = old_export(random_tensors(OldAttention()))
    del old["mid.value.bias"]
    old["mid.extra"] = np.zeros((2, 3), np.float32)
    lines = [line.strip() for line in refusal(OldAttention(), old).splitlines()[1:]]
    assert sorted(lines) == ["missing: mid.value.bias (6,)", "unexpected: mid.extra (2, 3)"]
    mixed = random_tensors(OldAttention())
    mixed["mid.query.bias"] = mixed.pop("mid.to_q.bias")
    lines = [line.strip() for line in refusal(OldAttention(), mixed).splitlines()[1:]]
    assert sorted(lines) == ["missing: mid.to_q.bias (6,)", "unexpected: mid.query.bias (6,)"]


@pytest.mark.parametrize("layout", CausalVideoVAE.layouts)
@pytest.mark.parametrize("wrapper", ["", "vae."])
def test_every_layout_round_trips_to_the_bit(layout, wrapper):
    """Module -> tensors under the layout's names -> module -> tensors under the first layout's names."""
    rename = CausalVideoVAE.layouts[layout]
    config = narrow((2, 2, 2, 4), groups=2, encoder_layers=1, decoder_layers=1)
    module = CausalVideoVAE.abstract(config)
    ours = {key: parameter.torch_shape for key, parameter in port.parameters(module).items()}
    generator = np.random.default_rng(0)
    before = {
        key: np.frombuffer(generator.bytes(4 * math.prod(shape)), np.float32).reshape(shape)
        for key, shape in ours.items()
    }
    stored = {wrapper + rename(key): array for key, array in before.items()}
    assert len(stored) == len(ours)
    port.load(module, port.Arrays(stored))
    after = port.torch_layout(module)
    assert after.keys() == ours.keys()
    assert all(after[key].tobytes() == before[key].tobytes() for key in ours)
    again = CausalVideoVAE.abstract(config)
    port.load(again, port.Arrays({wrapper + rename(key): array for key, array in after.items()}))
    assert all(array.tobytes() == before[key].tobytes() for key, array in port.torch_layout(again).items())


def test_old_names_are_those_of_attention_and_change_nothing_else():
    keys = port.parameters(CausalVideoVAE.abstract(CausalVideoVAEConfig.tiny()))
    changed = {old_keys(key).rpartition("attentions.0.")[2] for key in keys if old_keys(key) != key}
    assert changed == {
        f"{name}.{leaf}" for name in ("query", "key", "value", "proj_attn") for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("ones", [(1,), (1, 1), (1, 1, 1)])
def test_shapes_may_differ_by_trailing_ones_whatever_the_parameter(ones):
    weights, module = random_tensors(attention()), attention()
    port.load(module, port.Arrays({key: array.reshape(*array.shape, *ones) for key, array in weights.items()}))
    after = port.torch_layout(module)
    assert all((after[key].shape, after[key].tobytes()) == (x.shape, x.tobytes()) for key, x in weights.items())


def test_kernels_of_1x1x1_may_lack_their_trailing_ones():
    conv, weights = CausalConv3d(4, 6, 1, rngs=nnx.Rngs(0)), random_tensors(CausalConv3d(4, 6, 1, rngs=nnx.Rngs(0)))
    port.load(
        conv, port.Arrays({"conv.weight": weights["conv.weight"][:, :, 0, 0, 0], "conv.bias": weights["conv.bias"]})
    )
    assert port.torch_layout(conv)["conv.weight"].shape == (6, 4, 1, 1, 1)
    assert np.array_equal(port.torch_layout(conv)["conv.weight"], weights["conv.weight"])


def test_ones_elsewhere_are_other_shapes():
    weights = random_tensors(attention())
    weights["group_norm.weight"] = weights["group_norm.weight"].reshape(1, 6)
    weights["to_q.weight"] = weights["to_q.weight"].reshape(6, 1, 6)
    weights["to_v.weight"] = weights["to_v.weight"].reshape(6, 3, 2)
    problems = refusal(attention(), weights)
    assert "group_norm.weight is (1, 6), expected (6,)" in problems
    assert "to_q.weight is (6, 1, 6), expected (6, 6)" in problems
    assert "to_v.weight is (6, 3, 2), expected (6, 6)" in problems
    assert len(problems.splitlines()) == 4


def test_names_of_the_module_itself_are_never_rewritten():
    class Trainer(nnx.Module):
        def __init__(self):
            self.vae, self.loss, self.key = (CausalConv3d(2, 2, 1, rngs=nnx.Rngs(seed)) for seed in range(3))

    weights, module = random_tensors(Trainer()), Trainer()
    assert {key.split(".")[0] for key in weights} == {"vae", "loss", "key"}
    port.load(module, port.Arrays(weights))
    assert all(np.array_equal(array, weights[key]) for key, array in port.torch_layout(module).items())


@pytest.mark.parametrize(("layer", "sizes"), [(nnx.Embed, (3, 4)), (nnx.LayerNorm, (3,))])
def test_parameters_that_no_rule_covers_are_refused_by_name(layer, sizes):
    class Model(nnx.Module):
        def __init__(self):
            self.inner = nnx.List([layer(*sizes, rngs=nnx.Rngs(0))])
            self.loose = nnx.Param(jnp.zeros(2))

    with pytest.raises(ValueError, match=rf"inner\.0\.\w+ .* of a {layer.__name__}") as caught:
        port.parameters(Model())
    assert "loose (2,) of a Model" in str(caught.value)


def test_random_state_of_an_abstract_module_gets_values_of_its_own():
    class Two(nnx.Module):
        def __init__(self):
            self.first, self.second = resnet(dropout=0.5), resnet(dropout=0.5)

    module = nnx.eval_shape(Two)
    port.load(module, port.Arrays(random_tensors(Two())))
    first, second = (resnet.dropout.rngs for resnet in (module.first, module.second))
    assert first is not None
    assert second is not None
    assert int(first.count[...]) == 0
    assert not jnp.array_equal(jax.random.key_data(first.key[...]), jax.random.key_data(second.key[...]))
    x = jnp.ones((8, 8))
    assert not jnp.array_equal(module.first.dropout(x), module.first.dropout(x))


def test_state_that_no_checkpoint_holds_is_refused_before_reading():
    class Counter(nnx.Module):
        def __init__(self):
            self.linear, self.steps = Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Variable(jnp.zeros(()))

    problems = refusal(nnx.eval_shape(Counter), random_tensors(Counter()))
    assert "steps" in problems
    assert "Variable" in problems
    port.load(Counter(), port.Arrays(random_tensors(Counter())))


def test_gradients_take_torchs_names_and_axes():
    linear = Linear(3, 5, rngs=nnx.Rngs(0))
    x, cotangent = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    x = x[:, :3]
    grads = nnx.grad(lambda layer: (layer(jnp.asarray(x)) * cotangent).sum())(linear)
    named = port.torch_layout(linear, grads)
    np.testing.assert_allclose(named["weight"], cotangent.T @ x, rtol=1e-5)
    np.testing.assert_allclose(named["bias"], cotangent.sum(0), rtol=1e-5)
    with pytest.raises(ValueError, match="bias"):
        port.named_tensors(linear, nnx.State({"kernel": grads["kernel"]}))
