"""How a checkpoint finds its family: by its config.json, by the keys in it, or by the shapes of its weights."""

import json
import re

import numpy as np
import pytest

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.families import registry
from flax_vae.families.pyramid import narrow
from flax_vae.io import checkpoint, port
from flax_vae.io.checkpoint import CONFIG_FILE, WEIGHTS_FILE, open_checkpoint

LITTLE = narrow((4, 4, 4, 8), groups=2, encoder_layers=1, decoder_layers=1)
AS_RELEASED = narrow((32, 32, 32, 64), groups=32, encoder_layers=2, decoder_layers=1)


def tensors(config, rename=lambda key: key) -> dict[str, np.ndarray]:
    """Returns a model's weights, by torch's names as `rename` changes them."""
    rng = np.random.default_rng(0)
    ours = port.parameters(CausalVideoVAE.abstract(config))
    return {rename(key): rng.standard_normal(p.torch_shape, np.float32) for key, p in ours.items()}


def save(folder, config, values=None):
    """Saves a checkpoint of little weights, with these contents of config.json."""
    checkpoint.save(folder, config.to_dict() if values is None else values, port.Arrays(tensors(config)))
    return folder


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A checkpoint."""
    return save(tmp_path_factory.mktemp("checkpoint") / "little", LITTLE)


def without_config(folder, arrays):
    """Saves weights alone."""
    checkpoint.save(folder, {}, port.Arrays(arrays))
    (folder / CONFIG_FILE).unlink()
    return folder


def test_a_checkpoint_finds_its_class_by_the_name_in_its_config(little):
    vae = registry.from_pretrained(little)
    assert type(vae) is CausalVideoVAE
    assert vae.config == LITTLE
    held = {key: open_checkpoint(little).read(key) for key in open_checkpoint(little).shapes()}
    assert all(np.array_equal(array, held[key]) for key, array in port.torch_layout(vae).items())
    assert registry.from_pretrained(little, dtype=np.float16).dtype == np.float16
    assert registry.from_pretrained(little.parent, "little").config == LITTLE


@pytest.mark.parametrize("name", ["AutoencoderKL", "CausalVideoVAE ", ["CausalVideoVAE"], {"a": 1}, 3, True])
def test_an_unknown_class_is_an_error_that_lists_what_there_is(tmp_path, name):
    values = LITTLE.to_dict() | {"_class_name": name}
    save(tmp_path, LITTLE, values)
    said = rf"_class_name is {re.escape(repr(name))}, no family of flax_vae: expected one of .*\bCausalVideoVAE\b"
    with pytest.raises(ValueError, match=said):
        registry.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        registry.config_from_dict(values)
    with pytest.raises(ValueError, match=rf"config\.json: {said}"):
        registry.config_from_json(tmp_path / CONFIG_FILE)


@pytest.mark.parametrize("subfolder", [None, "pipeline"])
def test_a_subfolder_with_a_known_config_is_named_in_the_error(tmp_path, subfolder):
    folder = tmp_path / (subfolder or "")
    for name in ("vae", "vae_ema"):
        save(folder / name, LITTLE)
    for name, text in {"text_encoder": '{"_class_name": "T5"}', "broken": "{", "list": "[]"}.items():
        (folder / name).mkdir()
        (folder / name / CONFIG_FILE).write_text(text)
    said = rf"no weights in {folder}.*; {folder} has checkpoints in vae, vae_ema: name one as subfolder"
    with pytest.raises(FileNotFoundError, match=said):
        registry.from_pretrained(tmp_path, subfolder)
    save(folder, LITTLE, {"_class_name": "UNet"})
    said = rf"_class_name is 'UNet', no family.*; {folder} has checkpoints in vae, vae_ema: name one as subfolder"
    with pytest.raises(ValueError, match=said):
        registry.open_source(tmp_path, subfolder)
    assert registry.from_pretrained(folder, "vae").config == LITTLE


def test_an_error_names_no_subfolders_where_there_are_none(tmp_path, little):
    with pytest.raises(FileNotFoundError) as caught:
        registry.open_source(tmp_path)
    assert "subfolder" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"has no folder unet$"):
        registry.open_source(little, "unet")


def test_a_config_without_class_name_is_found_by_its_keys():
    values = LITTLE.to_dict()
    del values["_class_name"]
    assert registry.config_from_dict(values) == LITTLE
    assert registry.config_from_dict({"encoder_in_channels": 3}) == CausalVideoVAEConfig()
    for others in ({}, {"_diffusers_version": "0.1"}, values | {"z_dim": 16}, {"z_dim": 16}):
        with pytest.raises(ValueError, match=r"the config has no _class_name: expected one of .*\bCausalVideoVAE\b"):
            registry.config_from_dict(others)


def test_unsupported_values_are_those_of_the_family_s_config(tmp_path):
    values = LITTLE.to_dict() | {"encoder_act_fn": "relu"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: this config is not supported:\n  encoder_act_fn"):
        registry.config_from_json(tmp_path / CONFIG_FILE)
    assert registry.config_from_json(save(tmp_path / "fine", LITTLE) / CONFIG_FILE) == LITTLE


def old_names(key):
    return "module.vae." + CausalVideoVAE.layouts["old"](key)


def wrapped_names(key):
    return "state_dict.first_stage_model." + key.replace("encoder.", "encoder._orig_mod.")


@pytest.mark.parametrize("rename", [str, old_names, wrapped_names])
def test_weights_without_config_are_recognised_by_their_shapes_with_a_warning(tmp_path, rename):
    arrays = tensors(AS_RELEASED)
    folder = without_config(tmp_path / "weights", {rename(key): array for key, array in arrays.items()})
    with pytest.warns(UserWarning, match="the norms are taken to have 32 groups, as released: .* give a config.json"):
        assert registry.read_config(open_checkpoint(folder)) == AS_RELEASED
    with pytest.warns(UserWarning, match="32 groups"):
        vae = registry.from_pretrained(folder / WEIGHTS_FILE)
    assert all(np.array_equal(array, arrays[key]) for key, array in port.torch_layout(vae).items())


def foreign(arrays):
    return {"encoder.weight": np.zeros((3, 4), np.float32)}


def narrower(arrays):
    return tensors(LITTLE)


def without_a_bias(arrays):
    return {key: array for key, array in arrays.items() if key != "encoder.conv_in.conv.bias"}


def with_another(arrays):
    return arrays | {"encoder.extra": np.zeros(3, np.float32)}


@pytest.mark.filterwarnings("ignore:the norms are taken to have 32 groups")
@pytest.mark.parametrize("change", [foreign, narrower, without_a_bias, with_another])
def test_foreign_weights_without_config_are_an_error_that_names_the_families(tmp_path, change):
    folder = without_config(tmp_path / "weights", change(tensors(AS_RELEASED)))
    said = rf"no config.json beside the weights in {folder}, and their .* not those of .*\bCausalVideoVAE\b.*: add it"
    with pytest.raises(FileNotFoundError, match=said):
        registry.read_config(open_checkpoint(folder))
    with pytest.raises(FileNotFoundError, match="add it or pass a config"):
        registry.from_pretrained(folder)


def test_a_config_that_is_given_replaces_the_one_in_the_file(tmp_path, little):
    folder = without_config(tmp_path / "weights", tensors(LITTLE))
    assert registry.from_pretrained(folder, config=LITTLE).config == LITTLE
    assert CausalVideoVAE.from_pretrained(folder, config=LITTLE).config == LITTLE
    with pytest.raises(FileNotFoundError, match="add it or pass a config"):
        CausalVideoVAE.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"\.safetensors: not the weights of this CausalVideoVAE"):
        registry.from_pretrained(little, config=AS_RELEASED)


def test_presets_have_names_and_an_unknown_one_is_refused_with_the_known():
    names = registry.preset_names()
    assert names[:3] == ["pyramid-flow", "pyramid-flow-small", "pyramid-flow-tiny"]
    assert len(set(names)) == len(names)
    assert registry.preset("pyramid-flow") == CausalVideoVAEConfig.released()
    assert registry.preset("pyramid-flow-small") == CausalVideoVAEConfig.small()
    assert registry.preset("pyramid-flow-tiny") == CausalVideoVAEConfig.tiny()
    with pytest.raises(ValueError, match="model 'tiny': expected one of pyramid-flow, pyramid-flow-small, pyramid"):
        registry.preset("tiny")


def test_released_scalings_have_names_and_an_unknown_one_is_refused_with_the_known():
    for name, scaling in CausalVideoVAE.released_scalings.items():
        assert registry.released_scaling(name) == scaling
    with pytest.raises(ValueError, match=r"one of .*flux, sd3.*, got 'sdxl'"):
        registry.released_scaling("sdxl")


def test_a_model_without_values_has_the_class_and_the_shapes_of_its_config():
    assert registry.family_of(LITTLE) is CausalVideoVAE
    vae = registry.abstract(LITTLE)
    assert type(vae) is CausalVideoVAE
    assert {key: p.torch_shape for key, p in port.parameters(vae).items()} == {
        key: array.shape for key, array in tensors(LITTLE).items()
    }
