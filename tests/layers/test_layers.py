"""One contract that every layer that sees time keeps, and what norm, attention and dropout compute. float64.

B batch, T frames, H W pixels, C channels; a plan is the lengths of the chunks of a clip. The contract: chunks give
the whole, in values and gradients; no output sees a later frame; jit, batches and vmap change nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae.families.pyramid import DownBlock, MidBlock, UpBlock
from flax_vae.layers import attention as layers_attention
from flax_vae.layers.attention import Attention
from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.resample import SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample
from flax_vae.layers.resnet import CausalResnetBlock
from flax_vae.layers.sequence import run_layers
from tests.compiled import memory
from tests.slow import some_slow

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")

CHANNELS, FRAMES = 4, 7
LAYERS = {
    "causal conv": lambda rngs: CausalConv3d(CHANNELS, 6, 3, rngs=rngs),
    "strided, dilated conv": lambda rngs: CausalConv3d(CHANNELS, 4, (3, 3, 1), (3, 2, 1), (2, 1, 1), 2, rngs=rngs),
    "resnet": lambda rngs: CausalResnetBlock(CHANNELS, num_groups=2, output_scale_factor=1.5, rngs=rngs),
    "resnet with shortcut": lambda rngs: CausalResnetBlock(CHANNELS, 8, 2, rngs=rngs),
    "spatial down by conv": lambda rngs: SpatialDownsample(CHANNELS, 6, rngs=rngs),
    "spatial down by pooling": lambda rngs: SpatialDownsample(CHANNELS, use_conv=False, rngs=rngs),
    "temporal down by conv": lambda rngs: TemporalDownsample(CHANNELS, 6, rngs=rngs),
    "temporal down by pooling": lambda rngs: TemporalDownsample(CHANNELS, use_conv=False, rngs=rngs),
    "spatial up": lambda rngs: SpatialUpsample(CHANNELS, 2, rngs=rngs),
    "temporal up": lambda rngs: TemporalUpsample(CHANNELS, rngs=rngs),
    "down block": lambda rngs: DownBlock(CHANNELS, 8, 2, 2, temporal_downsample=True, rngs=rngs),
    "mid block": lambda rngs: MidBlock(CHANNELS, 2, rngs=rngs),
    "up block": lambda rngs: UpBlock(CHANNELS, 8, 1, 2, temporal_upsample=True, rngs=rngs),
}
STREAMED = [name for name in LAYERS if name != "spatial down by pooling"]  # which sees one frame at a time
# Down and up blocks are residual blocks and resamplers, one after the other, each of them checked by itself.
COMPOSED = ("down block", "up block")
every_layer = pytest.mark.parametrize("name", some_slow(LAYERS, COMPOSED))


def clip(noise, batch=2, frames=FRAMES, seed=1):
    return noise((batch, frames, 4, 6, CHANNELS), seed)


def apart(a, b):
    assert a.shape == b.shape
    return np.abs(np.asarray(a - b)).max(initial=0.0) / np.abs(np.asarray(b)).max(initial=1e-9)


@pytest.fixture(scope="module")
def compiled(randomized, jit):
    """Gives a function from a name in the table to step(chunk, carry) of that layer, compiled once a shape."""
    steps = {name: jit(lambda layer, x, carry: layer(x, carry), randomized(build)) for name, build in LAYERS.items()}
    return steps.__getitem__


@st.composite
def plans(draw):
    """Draws how to cut the frames into one to four chunks, at any place."""
    cuts = draw(st.sets(st.integers(1, FRAMES - 1), max_size=3))
    return np.diff([0, *sorted(cuts), FRAMES]).tolist()


@every_layer
@settings(max_examples=3)
@given(plan=plans())
def test_chunks_give_the_whole(name, compiled, noise, stream, plan):
    step, x = compiled(name), clip(noise)
    whole, carry = step(x, None)
    chunked, last = stream(step, x, plan)
    assert apart(chunked, whole) < 1e-12
    assert jax.tree.structure(last) == jax.tree.structure(carry)


@pytest.mark.parametrize("name", some_slow(STREAMED, COMPOSED))
@pytest.mark.parametrize(
    "tamper", [jnp.zeros_like, lambda carry: jnp.roll(carry, 1, axis=2)], ids=["zeroed", "a row off"]
)
def test_chunks_with_another_carry_give_something_else(name, tamper, compiled, noise, stream):
    step, x = compiled(name), clip(noise)
    chunked, _ = stream(step, x, [4, 3], lambda carry: jax.tree.map(tamper, carry))
    assert apart(chunked, step(x, None)[0]) > 1e-3


def weighted_sum(run, noise):
    def loss(layer, x):
        y = run(layer, x)[0]
        return (y * noise(y.shape, seed=2)).sum()

    return nnx.grad(loss, argnums=(0, 1))


@every_layer
def test_gradients_of_chunks_are_those_of_the_whole_and_finite(name, randomized, noise, stream, jit):
    layer = randomized(LAYERS[name])
    of_whole = jit(weighted_sum(lambda layer, x: layer(x), noise), layer)
    of_chunks = jit(weighted_sum(lambda layer, x: stream(layer, x, [4, 3]), noise), layer)
    x = clip(noise, batch=1)
    for got, wanted in zip(jax.tree.leaves(of_chunks(x)), jax.tree.leaves(of_whole(x)), strict=True):
        assert np.isfinite(wanted).all()
        assert np.abs(got - wanted).max() < 1e-10 * max(1.0, np.abs(wanted).max())
    constant = of_whole(jnp.full_like(x, 0.3))  # no variance to normalise
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(constant))


@every_layer
def test_no_output_sees_a_later_frame(name, compiled, noise):
    step, x = compiled(name), clip(noise)
    earlier = step(x[:, :4], None)[0].shape[1]
    y, z = step(x, None)[0], step(x.at[:, 4:].add(1.0), None)[0]
    assert jnp.array_equal(y[:, :earlier], z[:, :earlier])
    assert not jnp.isclose(y[:, earlier:], z[:, earlier:]).all(axis=(0, 2, 3, 4)).any()


@every_layer
def test_prefix_of_clip_gives_prefix_of_outputs(name, compiled, noise):
    step, x = compiled(name), clip(noise)
    prefix, whole = step(x[:, :4], None)[0], step(x, None)[0]
    assert apart(prefix, whole[:, : prefix.shape[1]]) < 1e-12


@every_layer
def test_compiled_layer_is_the_eager_one(name, compiled, randomized, noise):
    x = clip(noise)
    eager, jitted = randomized(LAYERS[name])(x), compiled(name)(x, None)
    for got, wanted in zip(jax.tree.leaves(jitted), jax.tree.leaves(eager), strict=True):
        assert apart(got, wanted) < 1e-12


@every_layer
def test_each_item_of_a_batch_is_computed_as_if_alone(name, randomized, noise, stream, jit):
    def both_ways(layer, x):
        return jax.vmap(lambda item: stream(layer, item[None], [4, 3])[0][0])(x), stream(layer, x, [4, 3])[0]

    alone, batched = jit(both_ways, randomized(LAYERS[name]))(clip(noise))
    assert apart(alone, batched) < 1e-12


def test_carry_of_another_chain_is_refused(noise):
    layers = [lambda x, carry: (x, ())] * 3
    with pytest.raises(ValueError, match="carry of 2 entries cannot go through 3 layers: use the carry of the same"):
        run_layers(layers, clip(noise), ((), ()))
    assert run_layers(layers, clip(noise), ((),) * 3)[1] == ((),) * 3


def group_norm(x, groups, scale, bias, eps):
    """Normalises frame by frame and group by group."""
    y = np.empty_like(x)
    for b, t, group in np.ndindex(*x.shape[:2], groups):
        width = x.shape[-1] // groups
        channels = slice(group * width, (group + 1) * width)
        values = x[b, t, :, :, channels]
        y[b, t, :, :, channels] = (values - values.mean()) / np.sqrt(values.var() + eps)
    return y * scale + bias


def attention(x, layer):
    """Attends among the pixels of one frame at a time, pixel by pixel."""
    norm = layer.group_norm
    y = group_norm(x, norm.num_groups, np.asarray(norm.scale[...]), np.asarray(norm.bias[...]), 1e-6)
    out = np.empty_like(x)
    for b, t in np.ndindex(*x.shape[:2]):
        pixels = y[b, t].reshape(-1, x.shape[-1])
        q, k, v = (
            pixels @ np.asarray(p.kernel[...]) + np.asarray(p.bias[...]) for p in (layer.to_q, layer.to_k, layer.to_v)
        )
        for query, (row, column) in zip(q, np.ndindex(*x.shape[2:4]), strict=True):
            weights = np.exp(k @ query / np.sqrt(x.shape[-1]))
            attended = weights / weights.sum() @ v
            projection = layer.to_out[0]
            out[b, t, row, column] = attended @ np.asarray(projection.kernel[...]) + np.asarray(projection.bias[...])
    return x + out


def test_norm_is_over_the_pixels_of_one_frame(randomized, noise):
    x = 0.01 * clip(noise) + 2.0  # far from zero, and a variance that feels the eps
    layer = randomized(lambda rngs: CausalGroupNorm(2, CHANNELS, rngs=rngs))
    scale, bias = np.asarray(layer.scale[...]), np.asarray(layer.bias[...])
    assert apart(layer(x), group_norm(np.asarray(x), 2, scale, bias, 1e-6)) < 1e-12
    assert apart(layer(x), group_norm(np.asarray(x), 2, scale, bias, 1e-5)) > 1e-3
    assert apart(layer(x), group_norm(np.asarray(x), 1, scale, bias, 1e-6)) > 1e-3


def test_attention_is_among_the_pixels_of_one_frame(randomized, noise):
    layer = randomized(lambda rngs: Attention(CHANNELS, 2, rngs=rngs))
    x = 3.0 * clip(noise)
    y = layer(x)
    assert apart(y, attention(np.asarray(x), layer)) < 1e-12
    layer.to_q, layer.to_k = layer.to_k, layer.to_q
    assert apart(y, attention(np.asarray(x), layer)) > 1e-3


@pytest.mark.parametrize("most", some_slow([1500, 200, 1], (1500, 200)))
def test_attention_in_parts_of_columns_is_the_same(most, randomized, noise, monkeypatch):
    layer, x = randomized(lambda rngs: Attention(CHANNELS, 2, rngs=rngs)), noise((2, 3, 4, 6, CHANNELS))

    def values(x):
        y, pull = jax.vjp(layer, x)
        return y, *pull(jnp.cos(y))

    whole = values(x)
    monkeypatch.setattr(layers_attention, "MAX_SCORES", most)
    assert layers_attention.column_parts(3, 4, 6) == {1500: 2, 200: 6, 1: 6}[most]
    assert all(apart(ours, theirs) < 1e-12 for ours, theirs in zip(values(x), whole, strict=True))


def test_attention_of_a_large_frame_never_holds_all_scores():
    layer, x = Attention(CHANNELS, 2, rngs=nnx.Rngs(0)), jax.ShapeDtypeStruct((1, 1, 96, 96, CHANNELS), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: layer(x).sum()))
    assert memory(gradient.lower(x).compile()).temp_size_in_bytes < 4 * (96 * 96) ** 2


@pytest.mark.parametrize(
    "layer", [lambda r: CausalGroupNorm(2, CHANNELS, rngs=r), lambda r: Attention(CHANNELS, 2, rngs=r)]
)
def test_norm_and_attention_see_one_frame_at_a_time(layer, randomized, noise):
    layer, x = randomized(layer), clip(noise)
    frames = [layer(x[:, t : t + 1]) for t in range(FRAMES)]
    assert apart(jnp.concatenate(frames, axis=1), layer(x)) < 1e-12


def test_norm_of_a_constant_frame_is_the_bias(randomized, noise):
    layer = randomized(lambda rngs: CausalGroupNorm(2, CHANNELS, rngs=rngs))
    x = jnp.full_like(clip(noise), 1e4)
    assert jnp.allclose(layer(x), jnp.broadcast_to(layer.bias[...], x.shape))


def test_resnet_adds_the_shortcut_and_divides(randomized, noise):
    layer = randomized(lambda rngs: CausalResnetBlock(CHANNELS, 8, 2, output_scale_factor=2.5, rngs=rngs))
    x = clip(noise)
    h = layer.conv1(nnx.silu(layer.norm1(x)))[0]
    h = layer.conv2(nnx.silu(layer.norm2(h)))[0]
    assert apart(layer(x)[0], (layer.conv_shortcut(x)[0] + h) / 2.5) < 1e-14
    assert randomized(lambda rngs: CausalResnetBlock(CHANNELS, num_groups=2, rngs=rngs)).conv_shortcut is None


def test_blocks_run_resnets_then_space_then_time(randomized, noise, jit):
    down = randomized(LAYERS["down block"])
    parts = [*down.resnets, *down.downsamplers, *down.temporal_downsamplers]
    assert apart(jit(run, down)(clip(noise)), jit(run, nnx.List(parts))(clip(noise))) < 1e-12
    up = randomized(LAYERS["up block"])
    parts = [*up.resnets, *up.upsamplers, *up.temporal_upsamplers]
    assert apart(jit(run, up)(clip(noise)), jit(run, nnx.List(parts))(clip(noise))) < 1e-12


def run(layers, x):
    """Gives the output of one layer, or of several in their order."""
    return run_layers(layers if isinstance(layers, nnx.List) else [layers], x)[0]


def test_dropout_acts_in_training_only(noise, jit):
    def run_in_both_modes(rngs, x):
        layer = CausalResnetBlock(CHANNELS, num_groups=2, dropout=0.5, rngs=rngs)
        training = layer(x)[0], layer(x)[0]
        layer.eval()
        still = layer(x)[0]
        layer.dropout.rate = 0.0
        return training, still, layer(x)[0]

    training, still, without = jit(run_in_both_modes, nnx.Rngs(0))(clip(noise).astype(jnp.float32))
    assert not jnp.array_equal(*training)
    assert not jnp.array_equal(training[0], still)
    assert jnp.array_equal(still, without)
