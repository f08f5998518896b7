"""The whole model: shapes, streaming, transformations, gradients, precision, and what it refuses.

B batch, T frames, H W pixels of a video; b t h w z of its latents; a plan is the lengths of the chunks of a clip.
The network is uneven and small: space and time are halved twice, the encoder in two blocks, the decoder in three.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.families.pyramid import narrow
from flax_vae.models.vae import fit_frames
from tests.little import ONE_BLOCK

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")

CONFIG = CausalVideoVAEConfig(
    encoder_out_channels=3,
    encoder_layers_per_block=(2, 1),
    encoder_down_block_types=("DownEncoderBlockCausal3D",) * 2,
    encoder_block_out_channels=(4, 6),
    encoder_spatial_down_sample=(True, True),
    encoder_temporal_down_sample=(True, True),
    encoder_block_dropout=(0.0, 0.0),
    encoder_norm_num_groups=2,
    decoder_in_channels=3,
    decoder_layers_per_block=(1, 1, 2),
    decoder_up_block_types=("UpDecoderBlockCausal3D",) * 3,
    decoder_block_out_channels=(4, 4, 8),
    decoder_spatial_up_sample=(True, False, True),
    decoder_temporal_up_sample=(False, True, True),
    decoder_block_dropout=(0.0, 0.0, 0.0),
    decoder_norm_num_groups=2,
)
FRAMES, LATENTS = 9, 3


def build(config=CONFIG):
    return lambda rngs: CausalVideoVAE(config, rngs=rngs)


def cast(vae, dtype):
    """Returns the same model with weights of another dtype."""
    graph, state = nnx.split(vae)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def apart(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return float(np.abs(np.asarray(a - b)).max() / np.abs(np.asarray(b)).max())


def video(noise, frames=FRAMES, height=7, width=10, batch=1):
    return noise((batch, frames, height, width, 3))


@pytest.fixture(scope="module")
def vae(randomized):
    return randomized(build())


@pytest.fixture(scope="module")
def little(randomized):
    """A model of one block, which compiles faster, for what depends on no config."""
    return randomized(build(ONE_BLOCK))


@dataclasses.dataclass
class Codec:
    """The two steps of a stream, compiled once a shape, and how far chunks may be from the whole."""

    dtype: str
    tolerance: float
    encode: nnx.Module
    decode: nnx.Module


@pytest.fixture(scope="module", params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def codec(request, vae, jit):
    def encode(vae, x, carry):
        posterior, carry = vae.encode_chunk(x, carry)
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1), carry

    cast_vae, tolerance = cast(vae, request.param), {"float64": 1e-12, "float32": 16 * np.finfo(np.float32).eps}
    decode = jit(lambda vae, z, carry: vae.decode_chunk(z, carry), cast_vae)
    return Codec(request.param, tolerance[request.param], jit(encode, cast_vae), decode)


def plans(frames):
    """Draws how to cut frames into one to three chunks, at any place."""
    cuts = st.sets(st.integers(1, frames - 1), max_size=2)
    return cuts.map(lambda cuts: np.diff([0, *sorted(cuts), frames]).tolist())


@pytest.mark.parametrize("config", [CONFIG, narrow((4, 4, 8, 8), 2, 1, 1)], ids=["uneven", "four blocks"])
@pytest.mark.parametrize(("chunks", "height", "width"), [(0, 13, 10), (1, 8, 9), (2, 1, 17)])
def test_shapes_are_those_the_config_says(config, chunks, height, width):
    frames = chunks * config.temporal_factor + 1
    model = nnx.eval_shape(lambda: build(config)(nnx.Rngs(0)))
    clip = jax.ShapeDtypeStruct((2, frames, height, width, 3), jnp.float32)
    posterior = nnx.eval_shape(lambda vae, x: vae.encode(x), model, clip)
    latents = config.latent_shape(frames, height, width)
    assert posterior.mean.shape == posterior.logvar.shape == (2, *latents)
    decoded = nnx.eval_shape(lambda vae, z: vae.decode(z), model, posterior.mean)
    assert decoded.shape == (2, *config.video_shape(*latents[:3]))
    assert decoded.shape[1] == frames


@settings(max_examples=2)
@given(plan=plans(FRAMES))
@hypothesis.example(plan=[1, 4, 4])
def test_chunks_encode_to_the_latents_of_the_whole(codec, noise, stream, plan):
    x = video(noise).astype(codec.dtype)
    whole, carry = codec.encode(x, None)
    chunked, last = stream(codec.encode, x, plan)
    assert apart(chunked, whole) < codec.tolerance
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, carry)


@pytest.mark.slow
@settings(max_examples=2)
@given(plan=plans(LATENTS))
@hypothesis.example(plan=[1, 1, 1])
def test_chunks_decode_to_the_video_of_the_whole(codec, noise, stream, plan):
    z = noise((1, LATENTS, 2, 3, 3)).astype(codec.dtype)
    assert apart(stream(codec.decode, z, plan)[0], codec.decode(z, None)[0]) < codec.tolerance


def test_chunks_with_a_zeroed_carry_give_something_else(codec, noise, stream):
    def zeroed(carry):
        return jax.tree.map(jnp.zeros_like, carry)

    x, z = video(noise).astype(codec.dtype), noise((1, LATENTS, 2, 3, 3)).astype(codec.dtype)
    assert apart(stream(codec.encode, x, [1, 4, 4], zeroed)[0], codec.encode(x, None)[0]) > 1e-2
    assert apart(stream(codec.decode, z, [1, 1, 1], zeroed)[0], codec.decode(z, None)[0]) > 1e-2


def test_prefix_of_clip_gives_prefix_of_latents(codec, noise):
    x = video(noise).astype(codec.dtype)
    whole, image = codec.encode(x, None)[0], codec.encode(x[:, :1], None)[0]
    assert apart(image, whole[:, :1]) < codec.tolerance
    assert apart(codec.encode(x[:, :5], None)[0], whole[:, :2]) < codec.tolerance


def test_frames_that_complete_no_latent_wait_in_the_carry(vae, noise):
    def encode_twice(vae, x):
        first, carry = vae.encode_chunk(x[:, :2])
        return first, vae.encode_chunk(x[:, 2:4], carry)[0]

    first, later = nnx.eval_shape(encode_twice, vae, video(noise))
    assert (first.mean.shape[1], later.mean.shape[1]) == (1, 0)


@pytest.mark.slow
def test_later_chunks_run_in_one_scan(little, noise, jit):
    def scanned(vae, x):
        first, carry = vae.encode_chunk(x[:, :1])
        chunks = jnp.stack(jnp.split(x[:, 1:], 2, axis=1))

        def step(carry, chunk):
            posterior, carry = vae.encode_chunk(chunk, carry)
            return carry, posterior.mean

        return jnp.concatenate([first.mean, *jax.lax.scan(step, carry, chunks)[1]], axis=1)

    x = video(noise)
    assert apart(jit(scanned, little)(x), jit(lambda vae, x: vae.encode(x).mean, little)(x)) < 1e-12


@pytest.mark.slow
def test_jit_of_flax_decodes_as_jit_of_jax_after_a_split(little, noise, jit):
    z = noise((1, 2, 2, 3, 2))
    decoded = nnx.jit(lambda vae, z: vae.decode(z))(little, z)
    assert apart(decoded, jit(lambda vae, z: vae.decode(z), little)(z)) < 1e-12


def test_jit_of_flax_encodes_as_jit_of_jax_after_a_split(little, noise, jit):
    x = video(noise, frames=3)
    encoded = nnx.jit(lambda vae, x: vae.encode(x))(little, x)
    assert apart(encoded.mean, jit(lambda vae, x: vae.encode(x), little)(x).mean) < 1e-12


@pytest.mark.slow
def test_vmap_over_the_batch_is_the_batch(little, noise, jit):
    def both_ways(vae, x):
        def reconstruct(x):
            return vae.decode(vae.encode(x).mean)

        return jax.vmap(lambda item: reconstruct(item[None])[0])(x), reconstruct(x)

    alone, batched = jit(both_ways, little)(video(noise, frames=5, batch=2))
    assert apart(alone, batched) < 1e-12


def loss(vae, x):
    posterior = vae.encode(x)
    difference = vae.decode(posterior.sample(jax.random.key(0))) - x
    return jnp.square(difference).mean() + 1e-3 * posterior.kl()


@pytest.fixture(scope="module")
def training(little, noise, jit):
    """Returns a clip, its loss and the gradients."""
    x = video(noise, frames=5, height=8, width=8)
    return x, *jit(nnx.value_and_grad(loss), little)(x)


def test_gradient_reaches_every_parameter(little, training):
    _, value, gradients = training
    sizes = {jax.tree_util.keystr(path): np.abs(leaf).max() for path, leaf in jax.tree.leaves_with_path(gradients)}
    assert len(sizes) == len(jax.tree.leaves(nnx.state(little, nnx.Param)))
    assert np.isfinite([value, *sizes.values()]).all()
    # A bias of the keys adds the same to every score of a query, which changes no softmax.
    keys = {name for name in sizes if "to_k" in name and "bias" in name}
    assert len(keys) == 2
    assert {name for name, size in sizes.items() if size < 1e-9} == keys


def test_one_step_of_adam_lowers_the_loss(little, training, jit):
    optax = pytest.importorskip("optax")
    x, before, gradients = training

    def after_a_step(vae, x, gradients):
        nnx.Optimizer(vae, optax.adam(1e-3), wrt=nnx.Param).update(vae, gradients)
        return loss(vae, x)

    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        assert jit(after_a_step, little)(x, gradients) < before - 1e-3


def test_bfloat16_weights_compute_in_bfloat16(vae, noise, jit):
    coarse, x = cast(vae, jnp.bfloat16), video(noise, frames=5)
    program = str(jax.make_jaxpr(lambda x: coarse.decode(coarse.encode(x).mean))(x))
    assert set(re.findall(r"(\w+)\[[\d,]*\] = conv_general_dilated", program)) == {"bf16"}
    assert nnx.eval_shape(lambda vae, z: vae.decode(z), coarse, noise((1, 2, 2, 3, 3))).dtype == jnp.bfloat16
    rounded, exact = (jit(lambda vae, x: vae.encode(x), model)(x) for model in (coarse, vae))
    assert {coarse.dtype, rounded.mean.dtype, rounded.logvar.dtype} == {jnp.dtype(jnp.bfloat16)}
    assert 1e-4 < apart(rounded.mean.astype(exact.mean.dtype), exact.mean) < 0.1


def test_every_block_has_the_dropout_the_config_says():
    config = dataclasses.replace(CONFIG, encoder_block_dropout=(0.1, 0.2), decoder_block_dropout=(0.3, 0.4, 0.5))
    vae: Any = nnx.eval_shape(lambda: build(config)(nnx.Rngs(0)))
    down, up = vae.encoder.down_blocks, vae.decoder.up_blocks
    assert [[resnet.dropout.rate for resnet in block.resnets] for block in down] == [[0.1, 0.1], [0.2]]
    assert [[resnet.dropout.rate for resnet in block.resnets] for block in up] == [[0.3], [0.4], [0.5, 0.5]]
    assert [resnet.dropout.rate for resnet in vae.encoder.mid_block.resnets] == [0.2, 0.2]
    assert [resnet.dropout.rate for resnet in vae.decoder.mid_block.resnets] == [0.3, 0.3]


def test_model_without_dropout_carries_no_random_state(vae):
    assert not jax.tree.leaves(nnx.state(vae, nnx.RngState))


@settings(max_examples=15)
@given(frames=st.integers(1, 9), wanted=st.integers(0, 12))
def test_fitting_frames_cuts_or_repeats_the_last(frames, wanted):
    x = np.arange(2.0 * frames * 3).reshape(2, frames, 3)
    kept = np.minimum(np.arange(wanted), frames - 1)
    assert np.array_equal(fit_frames(x, wanted), x[:, kept])


def zeros(*shape, dtype="float64"):
    return jnp.zeros(shape, dtype)


REFUSED = {
    "8 frames": (lambda vae: vae.encode(zeros(1, 8, 8, 8, 3)), r"4k \+ 1 frames, got 8; extra_frames='pad'"),
    "no frames": (lambda vae: vae.encode(zeros(1, 0, 8, 8, 3)), r"none of them 0, got \(1, 0, 8, 8, 3\)"),
    "no rows": (lambda vae: vae.encode(zeros(1, 5, 0, 8, 3)), "none of them 0"),
    "no batch axis": (lambda vae: vae.encode(zeros(5, 8, 8, 3)), r"expected \(batch, frames, .*got \(5, 8, 8, 3\)"),
    "channels first": (lambda vae: vae.encode(zeros(1, 3, 5, 8, 8)), r"width, 3\), .*got \(1, 3, 5, 8, 8\)"),
    "uint8": (lambda vae: vae.encode(zeros(1, 5, 8, 8, 3, dtype="uint8")), r"got uint8: .*flax_vae\.to_float"),
    "a chunk of no frames": (lambda vae: vae.encode_chunk(zeros(1, 0, 8, 8, 3)), "none of them 0"),
    "a chunk of uint8": (lambda vae: vae.encode_chunk(zeros(1, 5, 8, 8, 3, dtype="uint8")), "got uint8"),
    "no latents": (lambda vae: vae.decode(zeros(1, 0, 2, 2, 3)), "none of them 0"),
    "moments for latents": (lambda vae: vae.decode(zeros(1, 2, 2, 2, 6)), r"width, 3\), .*got \(1, 2, 2, 2, 6\)"),
    "integer latents": (lambda vae: vae.decode(zeros(1, 2, 2, 2, 3, dtype="int32")), "expected floating point"),
    "another network's carry": (
        lambda vae: vae.encode_chunk(zeros(1, 4, 8, 8, 3), ((),) * 4),
        "a carry of 4 entries cannot go through 5 layers",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case, vae):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act(vae)
