"""A model among the names of a file: wrappers of every kind and place, other parts beside it, several models."""

import numpy as np
import pytest

from flax_vae import CausalVideoVAE
from flax_vae.families.pyramid import narrow
from flax_vae.io import port
from flax_vae.io.foreign.wrapped import AVERAGED, common_prefix, find_parts

hypothesis = pytest.importorskip("hypothesis", reason="wrappers are drawn by hypothesis: pip install hypothesis")
given, st = hypothesis.given, hypothesis.strategies

MODEL = CausalVideoVAE.abstract(narrow((2, 2, 2, 4), groups=2, encoder_layers=1, decoder_layers=1))
SHAPES = {key: (p.torch_shape, "float32") for key, p in port.parameters(MODEL).items()}
OTHERS = {"optimizer.lr": (), "loss.logvar": (), "loss.main.0.weight": (4, 3, 4, 4)}
OTHERS = {name: (shape, "float32") for name, shape in OTHERS.items()}
SEGMENTS = ["_orig_mod", "_fsdp_wrapped_module", "_forward_module", "module", "first_stage_model", "model", "net"]
AVERAGES = ["ema", "model_ema", "ema_state_dict", "state_dict_ema", "generator_ema", "swa.module"]


def named(change) -> dict:
    """Returns the model's tensors under other names."""
    return {change(key): spec for key, spec in SHAPES.items()}


def refusal(shapes) -> str:
    with pytest.raises(ValueError) as caught:
        port.match(MODEL, shapes)
    return str(caught.value)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("place", [(), ("encoder",), ("decoder", "up_blocks", "1"), ("encoder", "conv_in")], ids=str)
def test_a_wrapper_is_taken_off_wherever_it_is(segment, place):
    def wrap(key):
        parts = key.split(".")
        is_below = tuple(parts[: len(place)]) == place
        return ".".join([*parts[: len(place)], segment, *parts[len(place) :]]) if is_below else key

    assert port.match(MODEL, named(wrap)) == {key: wrap(key) for key in SHAPES}


@given(st.lists(st.sampled_from(SEGMENTS), max_size=4), st.lists(st.sampled_from(SEGMENTS), max_size=3))
def test_wrappers_are_nested_in_any_order(outer, inner):
    def wrap(key):
        first, *rest = key.split(".")
        return ".".join([*outer, first, *(inner if first == "encoder" else ()), *rest])

    assert port.match(MODEL, named(wrap)) == {key: wrap(key) for key in SHAPES}


@pytest.mark.parametrize("prefix", ["vae.", "state_dict.first_stage_model.", "model.module.vae."])
def test_what_is_outside_of_the_model_s_prefix_is_left_out(prefix):
    shapes = named(lambda key: prefix + key) | OTHERS | {"n_averaged": ((), "int64")}
    assert port.match(MODEL, shapes) == {key: prefix + key for key in SHAPES}


def test_what_is_beside_the_model_within_its_prefix_is_not():
    assert "unexpected: loss.logvar ()" in refusal(SHAPES | OTHERS)
    wrapped = named(lambda key: f"model.{key}") | {"model.extra.bias": ((3,), "float32")}
    assert "unexpected: model.extra.bias (3,)" in refusal(wrapped)


@pytest.mark.parametrize("dtype", ["int64", "I64"])  # as torch's files and safetensors call it
def test_a_counter_beside_the_weights_is_left_out(dtype):
    assert port.match(MODEL, SHAPES | {"n_averaged": ((), dtype)}) == {key: key for key in SHAPES}
    assert "unexpected: scale ()" in refusal(SHAPES | {"scale": ((), "float32")})
    assert "unexpected: steps (3,)" in refusal(SHAPES | {"steps": ((3,), dtype)})
    assert "unexpected: encoder.steps ()" in refusal(SHAPES | {"encoder.steps": ((), dtype)})


@pytest.mark.parametrize("leaf", ["parametrizations.weight.original", "weight.original", "weight._orig_mod"])
def test_what_replaces_a_tensor_is_no_wrapper_of_it(leaf):
    """A reparametrised weight is not the weight."""
    changed = {key: key for key in SHAPES} | {"quant_conv.conv.weight": f"quant_conv.conv.{leaf}"}
    assert "missing: quant_conv.conv.weight" in refusal(named(changed.__getitem__))


def test_adapters_beside_a_layer_are_no_wrapper_of_it():
    shapes = named(lambda key: key.replace("to_q.", "to_q.base_layer."))
    assert port.match(MODEL, shapes)  # no adapter: the layer itself
    shapes |= {key.replace("base_layer", "lora_A"): spec for key, spec in shapes.items() if "base_layer.weight" in key}
    assert "lora_A" in refusal(shapes)


@pytest.mark.parametrize("average", AVERAGES)
def test_of_weights_and_their_average_the_average_is_taken_and_said(average):
    shapes = named(lambda key: f"model.vae.{key}") | named(lambda key: f"{average}.{key}") | OTHERS
    with pytest.warns(
        UserWarning, match=f"several models, in .*'model.vae'.*'{average}', the averaged weights, is taken"
    ):
        assert port.match(MODEL, shapes) == {key: f"{average}.{key}" for key in SHAPES}


def test_an_average_beside_weights_at_the_top_is_another_part():
    with pytest.warns(UserWarning, match=r"in '\(top\)', 'ema': 'ema', the averaged weights, is taken"):
        assert port.match(MODEL, SHAPES | named(lambda key: f"ema.{key}")) == {key: f"ema.{key}" for key in SHAPES}


@pytest.mark.parametrize("other", ["teacher", "cinema", "schema.model"])
def test_several_models_that_nothing_tells_apart_are_refused_by_name(other):
    message = refusal(named(lambda key: f"model.{key}") | named(lambda key: f"{other}.{key}"))
    listed = ", ".join(sorted(map(repr, ["model", other])))
    assert f"this file holds several models, in {listed}: name one, as `part`" in message
    assert not AVERAGED.search(f"{other}.")


def test_an_average_that_is_not_whole_is_no_model():
    partial = {f"ema.{key}": spec for key, spec in [*SHAPES.items()][:9]}
    assert port.match(MODEL, named(lambda key: f"model.{key}") | partial) == {key: f"model.{key}" for key in SHAPES}


def test_an_error_is_short_and_names_the_prefix_that_it_saw():
    foreign = {f"transformer.blocks.{i}.weight": ((3, 3), "float32") for i in range(300)}
    message = refusal(foreign)
    assert "expected names as decoder.conv_in.conv.bias" in message
    assert "got 300 tensors, all under 'transformer.blocks.', such as transformer.blocks.0.weight" in message
    assert len(message.splitlines()) == 1
    message = refusal({f"first.vae.{key}": spec for key, spec in SHAPES.items() if "decoder" not in key})
    assert "looked for under 'first.vae.'" in message
    count = sum(key.startswith("decoder.") for key in SHAPES)
    assert message.splitlines()[1:] == [f"  missing: all {count} tensors under decoder."]


def test_names_from_strangers_are_bounded():
    with pytest.raises(ValueError, match="more than 100,000 tensors"):
        find_parts(SHAPES, map(str, range(100_001)))
    deep = ".".join(["a"] * 100_000)
    assert "expected names as" in refusal({deep: ((2,), "float32"), f"{deep}.b": ((2,), "float32")})


def test_the_common_prefix_is_of_whole_segments():
    assert common_prefix(["a.bc.d", "a.bd.d"]) == "a."
    assert common_prefix(["a.b.c"]) == "a.b."
    assert common_prefix(["a", "b"]) == ""


def test_a_wrapped_model_loads_to_the_bit():
    rng = np.random.default_rng(0)
    arrays = {f"model.{key}": rng.standard_normal(shape, np.float32) for key, (shape, _) in SHAPES.items()}
    module = CausalVideoVAE.abstract(MODEL.config)
    port.load(module, port.Arrays(arrays | {"step": np.array(3)}))
    assert all(np.array_equal(x, arrays[f"model.{key}"]) for key, x in port.torch_layout(module).items())
