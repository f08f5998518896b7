"""Pyramid-Flow's config: read, written, checked, read off weights; and what the released model is."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.families.pyramid import narrow
from flax_vae.io import port
from flax_vae.io.weights import Spec
from flax_vae.layers.sequence import Execution

DOWN, UP = "DownEncoderBlockCausal3D", "UpDecoderBlockCausal3D"
RELEASED = {
    "encoder_in_channels": 3,
    "encoder_out_channels": 16,
    "encoder_layers_per_block": [2, 2, 2, 2],
    "encoder_down_block_types": [DOWN, DOWN, DOWN, DOWN],
    "encoder_block_out_channels": [128, 256, 512, 512],
    "encoder_spatial_down_sample": [True, True, True, False],
    "encoder_temporal_down_sample": [True, True, True, False],
    "encoder_block_dropout": [0.0, 0.0, 0.0, 0.0],
    "encoder_act_fn": "silu",
    "encoder_norm_num_groups": 32,
    "encoder_double_z": True,
    "encoder_type": "causal_vae_conv",
    "decoder_in_channels": 16,
    "decoder_out_channels": 3,
    "decoder_layers_per_block": [3, 3, 3, 3],
    "decoder_up_block_types": [UP, UP, UP, UP],
    "decoder_block_out_channels": [128, 256, 512, 512],
    "decoder_spatial_up_sample": [True, True, True, False],
    "decoder_temporal_up_sample": [True, True, True, False],
    "decoder_block_dropout": [0.0, 0.0, 0.0, 0.0],
    "decoder_act_fn": "silu",
    "decoder_norm_num_groups": 32,
    "decoder_type": "causal_vae_conv",
    "sample_size": 256,
    "scaling_factor": 0.18215,
    "add_post_quant_conv": True,
    "interpolate": False,
    "downsample_scale": 8,
    "_class_name": "CausalVideoVAE",
}
UNEVEN = RELEASED | {
    "encoder_layers_per_block": [1, 2],
    "encoder_down_block_types": [DOWN] * 2,
    "encoder_block_out_channels": [32, 96],
    "encoder_spatial_down_sample": [True, True],
    "encoder_temporal_down_sample": [False, True],
    "encoder_block_dropout": [0.0, 0.25],
    "decoder_layers_per_block": [1, 1, 3],
    "decoder_up_block_types": [UP] * 3,
    "decoder_block_out_channels": [64, 32, 64],
    "decoder_spatial_up_sample": [True, False, True],
    "decoder_temporal_up_sample": [False, True, False],
    "decoder_block_dropout": [0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("values", [RELEASED, UNEVEN], ids=["released", "uneven"])
def test_reading_and_writing_keeps_every_key(values):
    written = CausalVideoVAEConfig.from_dict(values).to_dict()
    assert written == values
    assert json.loads(json.dumps(written)) == values
    assert {field.name for field in dataclasses.fields(CausalVideoVAEConfig)} == set(values) - {"_class_name"}
    assert CausalVideoVAEConfig.public_keys() == set(values) - {"_class_name"}


def test_released_values_are_the_defaults():
    assert (
        CausalVideoVAEConfig.from_dict(RELEASED)
        == CausalVideoVAEConfig.released()
        == CausalVideoVAEConfig()
        == CausalVideoVAEConfig.from_dict({})
    )


def test_bookkeeping_of_the_writer_is_ignored():
    extra = {"_use_default_values": list(RELEASED), "_diffusers_version": "0.1"}
    assert CausalVideoVAEConfig.from_dict(RELEASED | extra) == CausalVideoVAEConfig.released()


def test_file_is_read_and_named_where_it_is_wrong(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(UNEVEN))
    assert CausalVideoVAEConfig.from_json(path) == CausalVideoVAEConfig.from_dict(UNEVEN)
    for text in (
        "",
        "{",
        "[1, 2]",
        "null",
        '{"interpolate": true}',
        "[" * 100_000,
        '{"sample_size": 1' + "0" * 9000 + "}",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: "):
            CausalVideoVAEConfig.from_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config\.json: "):
        CausalVideoVAEConfig.from_json(path)


UNSUPPORTED = [
    ("interpolate", True, "interpolate must be false"),
    ("encoder_act_fn", "relu", "encoder_act_fn must be 'silu', got 'relu'"),
    ("decoder_act_fn", "gelu", "decoder_act_fn must be 'silu', got 'gelu'"),
    ("encoder_down_block_types", [DOWN, "Down2D", DOWN, DOWN], f"encoder_.*block_types must be {DOWN}, got Down2D"),
    ("decoder_up_block_types", [UP, UP, UP, DOWN], f"decoder_.*block_types must be {UP}, got {DOWN}"),
    ("encoder_block_out_channels", [128, 256, 512], "encoder_layers_per_block must have 3 entries, .* got 4"),
    ("decoder_layers_per_block", [3, 3, 3], "decoder_layers_per_block must have 4 entries, one a block, got 3"),
    ("encoder_layers_per_block", [2, 2, 2, 0], "encoder_layers_per_block must be 1 to 64"),
    ("decoder_layers_per_block", [10**9] * 4, "decoder_layers_per_block must be 1 to 64"),
    ("encoder_block_out_channels", [128, 256, 512, 500], r"encoder_norm_num_groups \(32\) must divide"),
    ("decoder_norm_num_groups", 0, "decoder channels and norm groups must be 1 to"),
    ("encoder_out_channels", -16, "encoder channels and norm groups must be 1 to"),
    ("encoder_out_channels", 10**12, "encoder channels and norm groups must be 1 to"),
    ("decoder_in_channels", 8, r"decoder_in_channels \(8\) must equal encoder_out_channels \(16\)"),
    ("encoder_spatial_down_sample", [True, True, False, False], r"doubles .*\(3, 3\) times, .* halves them \(2, 3\)"),
    ("decoder_temporal_up_sample", [True] * 4, r"doubles space and time \(3, 4\) times"),
    ("encoder_block_dropout", [0.0, 0.0, 0.0, 1.0], "encoder_block_dropout must be at least 0 and less than 1"),
    ("decoder_block_dropout", [math.nan] * 4, "decoder_block_dropout must be at least 0"),
    ("decoder_block_dropout", [-0.1, 0.0, 0.0, 0.0], "decoder_block_dropout must be at least 0"),
    ("sample_size", 0, "sample_size and downsample_scale must be at least 1, got 0 and 8"),
    ("scaling_factor", math.inf, "scaling_factor must be finite, got inf"),
    ("decoder_block_out_channels", [32] * 17, "decoder: at most 16 blocks, got 17"),
]
MISTYPED = [
    ("encoder_in_channels", "3", "encoder_in_channels must be int, got '3'"),
    ("encoder_in_channels", 3.0, "encoder_in_channels must be int, got 3.0"),
    ("encoder_in_channels", True, "encoder_in_channels must be int, got True"),
    ("encoder_in_channels", None, "encoder_in_channels must be int, got None"),
    ("encoder_in_channels", [3], "encoder_in_channels must be int"),
    ("interpolate", 0, "interpolate must be bool, got 0"),
    ("interpolate", "false", "interpolate must be bool, got 'false'"),
    ("scaling_factor", "big", "scaling_factor must be float, got 'big'"),
    ("encoder_act_fn", ["silu"], "encoder_act_fn must be str"),
    ("encoder_layers_per_block", 2, "encoder_layers_per_block must be a list of int, got 2"),
    ("encoder_layers_per_block", "2222", "encoder_layers_per_block must be a list of int, got '2222'"),
    ("encoder_layers_per_block", [[2], [2], [2], [2]], "encoder_layers_per_block must be a list of int"),
    ("encoder_layers_per_block", [], "encoder_layers_per_block must be a list of int"),
    ("encoder_layers_per_block", {"0": 2}, "encoder_layers_per_block must be a list of int"),
    ("decoder_spatial_up_sample", [1, 1, 1, 0], "decoder_spatial_up_sample must be a list of bool"),
    ("decoder_block_out_channels", [128, 256, 512, True], "decoder_block_out_channels must be a list of int"),
]


@pytest.mark.parametrize(("key", "value", "message"), UNSUPPORTED + MISTYPED)
def test_refused_by_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        CausalVideoVAEConfig.from_dict(RELEASED | {key: value})


@pytest.mark.parametrize("setting", ["remat", "frame_by_frame"])
def test_a_setting_of_the_run_is_in_no_config_file(setting):
    vae = CausalVideoVAE.abstract(CausalVideoVAEConfig.from_dict(UNEVEN))
    vae.execution = Execution(**{setting: True})
    assert vae.encoder.execution == vae.decoder.execution == Execution(**{setting: True}) != Execution()
    assert vae.config.to_dict() == UNEVEN
    with pytest.raises(ValueError, match=rf"unknown config keys: {setting}; a config\.json has no such settings"):
        CausalVideoVAEConfig.from_dict(UNEVEN | {setting: True})
    with pytest.warns(UserWarning, match=f"left out of the config.*: {setting}"):
        assert CausalVideoVAEConfig.from_dict(UNEVEN | {setting: False}).to_dict() == UNEVEN


def test_every_problem_is_named_at_once():
    values = {"interpolate": True, "encoder_act_fn": "relu", "decoder_norm_num_groups": 7, "decoder_in_channels": 4}
    with pytest.raises(ValueError, match="not supported") as caught:
        CausalVideoVAEConfig.from_dict(RELEASED | values)
    assert [key for key in values if key not in str(caught.value)] == []
    assert str(caught.value).count("\n") == 4


def test_every_wrong_type_is_named_at_once():
    with pytest.raises(ValueError, match=r"sample_size must be int(.|\n)*interpolate must be bool"):
        CausalVideoVAEConfig.from_dict(RELEASED | {"interpolate": "no", "sample_size": "256"})


def test_unknown_keys_are_named_at_once():
    with pytest.raises(ValueError, match="unknown config keys: latent_channels, use_flash"):
        CausalVideoVAEConfig.from_dict(RELEASED | {"use_flash": True, "latent_channels": 16})


@pytest.mark.parametrize("name", ["AutoencoderKL", "", None, 3, ["CausalVideoVAE"]])
def test_config_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match=r"_class_name is .* expected 'CausalVideoVAE'"):
        CausalVideoVAEConfig.from_dict(RELEASED | {"_class_name": name})


@pytest.mark.parametrize("values", [None, [], "{}", 3])
def test_config_must_be_an_object(values):
    with pytest.raises(ValueError, match="object of keys and values, got " + type(values).__name__):
        CausalVideoVAEConfig.from_dict(values)


def test_config_cannot_be_changed_and_can_be_a_key():
    config = CausalVideoVAEConfig.tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.encoder_in_channels = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert {config: 1}[CausalVideoVAEConfig.tiny()] == 1


def parameters(config):
    """Counts the parameters of the whole and of its four parts, without making any."""
    model = nnx.eval_shape(lambda: CausalVideoVAE(config, rngs=nnx.Rngs(0)))
    parts = {name: getattr(model, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")}
    return {name: [math.prod(p.shape) for p in jax.tree.leaves(nnx.state(part))] for name, part in parts.items()}


def test_full_config_is_the_released_model():
    counts = parameters(CausalVideoVAEConfig.released())
    assert {name: sum(sizes) for name, sizes in counts.items()} == {
        "encoder": 109_632_032,
        "decoder": 225_768_707,
        "quant_conv": 1056,
        "post_quant_conv": 272,
    }
    assert sum(len(sizes) for sizes in counts.values()) == 260


@pytest.mark.parametrize(
    ("config", "millions"), [(CausalVideoVAEConfig.tiny(), 3.2), (CausalVideoVAEConfig.small(), 14.4)]
)
def test_presets_have_the_documented_size(config, millions):
    assert round(sum(map(sum, parameters(config).values())) / 1e6, 1) == millions


def test_narrow_changes_widths_groups_and_layers_only():
    config = narrow((8, 8, 16, 24), groups=4, encoder_layers=1, decoder_layers=3)
    changed = {key for key, value in config.to_dict().items() if value != RELEASED[key]}
    assert changed == {
        *(f"{side}_{key}" for side in ("encoder", "decoder") for key in ("block_out_channels", "norm_num_groups")),
        "encoder_layers_per_block",
    }
    assert config.decoder_layers_per_block == (3, 3, 3, 3)


def test_shapes_of_latents_and_video():
    config, uneven = CausalVideoVAEConfig.released(), CausalVideoVAEConfig.from_dict(UNEVEN)
    assert (config.spatial_factor, config.temporal_factor, config.latent_channels) == (8, 8, 16)
    assert (uneven.spatial_factor, uneven.temporal_factor) == (4, 2)
    assert config.latent_shape(17, 720, 1281) == (3, 90, 161, 16)
    assert config.video_shape(3, 90, 161) == (17, 720, 1288, 3)
    assert uneven.latent_shape(3, 9, 4) == (2, 3, 1, 16)
    assert uneven.video_shape(2, 3, 1) == (3, 12, 4, 3)
    with pytest.raises(ValueError, match=r"8k \+ 1 frames, got 16: use 9 or 17"):
        config.latent_shape(16, 64, 64)
    with pytest.raises(ValueError, match="at least one latent frame"):
        config.video_shape(0, 8, 8)


def specs(config, **changes) -> dict[str, Spec]:
    """Returns names and shapes of a model's weights, as a file holds them."""
    shapes = {key: (p.torch_shape, "float32") for key, p in port.parameters(CausalVideoVAE.abstract(config)).items()}
    return shapes | changes


@pytest.mark.parametrize(
    "config",
    [CausalVideoVAEConfig(), CausalVideoVAEConfig.from_dict(UNEVEN | {"encoder_block_dropout": [0.0, 0.0]})],
    ids=["released", "uneven"],
)
def test_a_config_is_read_off_the_shapes_of_weights(config):
    config = dataclasses.replace(config, encoder_in_channels=4, decoder_out_channels=5)
    with pytest.warns(UserWarning, match="the norms are taken to have 32 groups, as released"):
        assert CausalVideoVAEConfig.from_shapes(specs(config)) == config


OTHERS = {
    "none": lambda held: {},
    "others": lambda held: {"weight": ((3, 4), "float32")},
    "half": lambda held: {key: spec for key, spec in held.items() if not key.startswith("decoder.")},
    "no input": lambda held: {key: spec for key, spec in held.items() if "conv_in" not in key},
    "scalars": lambda held: dict.fromkeys(held, ((), "float32")),
    "widths that 32 groups do not divide": lambda held: specs(CausalVideoVAEConfig.tiny()),
    "one side": lambda held: {key: spec for key, spec in held.items() if "up_blocks" in key},
}


@pytest.mark.parametrize("change", OTHERS)
def test_no_config_is_read_off_other_weights(change):
    with pytest.raises(ValueError, match=r"not the weights of a CausalVideoVAE|this config is not supported"):
        CausalVideoVAEConfig.from_shapes(OTHERS[change](specs(CausalVideoVAEConfig())))


def test_the_table_of_a_config_shows_both_sides():
    columns, rows = CausalVideoVAEConfig.tiny().describe()
    assert columns == ["", "encoder", "decoder"]
    assert ("block_out_channels", "16, 32, 48, 64", "16, 32, 48, 64") in rows
    assert ("in_channels", "3", "16") in rows
    assert ("spatial_down/up_sample", "True, True, True, False", "True, True, True, False") in rows
