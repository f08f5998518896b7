"""What every family of the registry promises, with its smallest preset."""

from operator import attrgetter
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae.families.registry import FAMILIES, abstract, config_from_dict, family_of, preset, preset_names
from flax_vae.io import port
from flax_vae.layers.sequence import Execution
from flax_vae.models.config import ExtraFrames, Rounding, Streams
from flax_vae.models.vae import VideoVAE

SMALLEST = [name for name in preset_names() if name.endswith("-tiny")]


def model_of(config) -> Any:
    """Returns the class, which every family calls as (config, rngs=)."""
    return family_of(config)


def built(config) -> VideoVAE:
    """Builds a model with random weights."""
    return model_of(config)(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_class_and_config_bear_the_public_name(name):
    family = FAMILIES[name]
    assert issubclass(family, VideoVAE)
    assert family.__name__ == family.config_class.class_name == name
    assert family.config_class.streams in get_args(Streams)
    assert family.config_class.rounding in get_args(Rounding)
    assert any(preset in family.presets for preset in SMALLEST), f"{name} has no preset that ends in -tiny"


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_configs_that_a_file_can_hold(name):
    config = preset(name)
    assert config_from_dict(config.to_dict()) == config
    assert name in family_of(config).presets


@pytest.mark.parametrize("name", SMALLEST)
def test_layouts_give_every_parameter_a_name_of_its_own(name):
    vae = abstract(preset(name))
    keys = port.parameters(vae)
    for layout in vae.layouts.values():
        assert len({layout(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("name", SMALLEST)
def test_last_kernel_is_the_one_that_makes_pixels(name):
    vae = abstract(preset(name))
    kernel = attrgetter(".".join(vae.last_kernel))(vae)
    assert isinstance(kernel, nnx.Param)
    assert kernel.shape[-1] % vae.config.pixel_channels == 0


@pytest.mark.parametrize("name", SMALLEST)
def test_config_tells_the_shapes(name):
    config = preset(name)
    frames, side = config.pixel_frames(3), 4 * config.spatial_factor
    clip = jax.ShapeDtypeStruct((2, frames, side, 2 * side, config.pixel_channels), jnp.float32)
    latents = jax.eval_shape(lambda x: built(config).encode(x).mean, clip)
    assert latents.shape == (2, *config.latent_shape(*clip.shape[1:4]))
    video = jax.eval_shape(lambda z: built(config).decode(z), latents)
    assert video.shape == clip.shape == (2, *config.video_shape(*latents.shape[1:4]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_chunks_and_executions_give_the_whole_clip(name, randomized, jit, noise, float64):
    config = preset(name)
    vae = randomized(lambda rngs: model_of(config)(config, rngs=rngs))
    side = 2 * config.spatial_factor
    clip = noise((1, config.pixel_frames(3), side, side, config.pixel_channels))
    whole = jit(lambda vae, x: vae.decode(vae.encode(x).mean), vae)(clip)
    chunk = config.chunk_frames(1)
    if config.streams == "exact":
        chunked = jit(lambda vae, x: vae.decode(vae.encode(x, chunk).mean, 1), vae)(clip)
        np.testing.assert_allclose(chunked, whole, rtol=0, atol=1e-10 * np.abs(whole).max())
    vae.execution = Execution(frame_by_frame=True)
    assert vae.decoder.execution == vae.encoder.execution == vae.execution
    by_frame = jit(lambda vae, x: vae.decode(vae.encode(x).mean), vae)(clip)
    np.testing.assert_allclose(by_frame, whole, rtol=0, atol=1e-10 * np.abs(whole).max())


@pytest.mark.parametrize("policy", get_args(ExtraFrames)[1:])
@pytest.mark.parametrize("name", SMALLEST)
def test_extra_frames_are_padded_or_trimmed_to_whole_latents(name, policy):
    config = preset(name)
    side, frames = config.spatial_factor, config.pixel_frames(2) + 1
    if config.temporal_factor == 1:
        pytest.skip("any number of frames makes whole latents")
    clip = jax.ShapeDtypeStruct((1, frames, side, side, config.pixel_channels), jnp.float32)
    latents = jax.eval_shape(lambda x: built(config).encode(x, extra_frames=policy).mean, clip)
    assert latents.shape[1] == (3 if policy == "pad" else 2)
    with pytest.raises(ValueError, match="extra_frames='pad'"):
        jax.eval_shape(lambda x: built(config).encode(x).mean, clip)
