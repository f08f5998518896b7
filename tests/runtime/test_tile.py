"""Lossy tiles: what the public algorithm gives, in the memory of a tile, in chunks and streams as without.

B batch, T frames, H W pixels, C channels. The expectation is the algorithm as it reads, in numpy, a tile and a row of
pixels at a time.
"""

import itertools
import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE
from flax_vae.io import trees
from flax_vae.jobs.reconstruct import lossy_psnr
from flax_vae.layers.sequence import Execution
from flax_vae.metrics.psnr import psnr
from flax_vae.runtime import stream
from flax_vae.runtime.tile import LossyTiles, LossyTiling, TiledModule, in_lossy_tiles, tiles_by_shape
from tests.compiled import memory
from tests.little import ONE_BLOCK

hypothesis = pytest.importorskip("hypothesis", reason="sizes are drawn by hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

TILING = LossyTiling(8, 2)
ULP = np.finfo(np.float32).eps


def public_algorithm(step, x, tiling, ratio):
    """Runs `step(tile)` over tiles and blends them; leaves out last tiles that the one before them covers."""
    stride, extent = tiling.tile - tiling.overlap, int(tiling.overlap * ratio)
    tops, lefts = ([s for s in range(0, size, stride) if s == 0 or size - s > tiling.overlap] for size in x.shape[2:4])
    tiles = [[np.array(step(x[:, :, i : i + tiling.tile, j : j + tiling.tile])) for j in lefts] for i in tops]
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            for k in range(extent if i else 0):
                above = tiles[i - 1][j][:, :, k - extent]
                tile[:, :, k] = above * (1 - k / extent) + tile[:, :, k] * (k / extent)
            for k in range(extent if j else 0):
                left = row[j - 1][:, :, :, k - extent]
                tile[:, :, :, k] = left * (1 - k / extent) + tile[:, :, :, k] * (k / extent)
    rows = [np.concatenate([*(t[:, :, :, :-extent] for t in row[:-1]), row[-1]], axis=3) for row in tiles]
    return np.concatenate([*(row[:, :, :-extent] for row in rows[:-1]), rows[-1]], axis=2)


def enlarge(x, factor):
    return x.repeat(factor, axis=2).repeat(factor, axis=3)


def pick(x, factor):
    return x[:, :, ::factor, ::factor]


def resize(x, ratio):
    """Makes frames `ratio` times as large, rounded up, every pixel from one."""
    return pick(enlarge(x, ratio.numerator), ratio.denominator)


def local_step(ratio):
    """Returns a step that sees nothing but a pixel, so that its tiles are the same as the whole."""
    return lambda x, carry: (jnp.sin(resize(x, ratio)), carry)


def tile_wide_step(ratio):
    """Returns a step whose every pixel depends on all of the tile, so that blending shows."""
    return lambda x, carry: (resize(x, ratio) + 3 * x.mean(axis=(2, 3), keepdims=True), carry)


def adding_step(x, carry):
    """Sums the frames of a stream up."""
    y = jnp.cumsum(x, axis=1) if carry is None else jnp.cumsum(x, axis=1) + carry
    return y, y[:, -1:]


def close(a, b, ulps):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() <= ulps * ULP * np.abs(b).max()


@st.composite
def tilings(draw, factor=1, most=20):
    overlap = draw(st.integers(1, most // 2))
    return LossyTiling(draw(st.integers(2 * overlap, 3 * most)) * factor, overlap * factor)


@given(tilings(), st.integers(1, 400))
def test_spans_cover_every_pixel_and_no_tile_lies_within_the_one_before(tiling, size):
    spans = tiling.spans(size)
    assert (spans[0][0], spans[-1][1]) == (0, size)
    for (start, stop), (next_start, next_stop) in itertools.pairwise(spans):
        assert (stop - start, stop - next_start) == (tiling.tile, tiling.overlap)
        assert next_stop > stop
    assert spans[-1][1] - spans[-1][0] <= tiling.tile


@given(tilings(), st.integers(1, 400))
def test_spans_are_the_public_ones_without_last_tiles_that_the_one_before_covers(tiling, size):
    public = [(start, min(start + tiling.tile, size)) for start in range(0, size, tiling.tile - tiling.overlap)]
    needed = [span for i, span in enumerate(public) if i == 0 or size - span[0] > tiling.overlap]
    assert tiling.spans(size) == needed
    assert len(public) - len(needed) in (0, 1)


def test_the_public_models_tiling_is_the_default():
    assert LossyTiling().scaled(Fraction(1, 8)) == LossyTiling(32, 8)
    assert LossyTiling().spans(720) == [(0, 256), (192, 448), (384, 640), (576, 720)]
    assert LossyTiling().spans(640) == [(0, 256), (192, 448), (384, 640)]  # the public algorithm adds (576, 640)
    assert LossyTiling().spans(1) == [(0, 1)]


@given(tilings(factor=8), st.integers(1, 2000))
def test_tiles_of_latents_are_those_of_pixels(tiling, size):
    latents = tiling.scaled(Fraction(1, 8)).spans(-(-size // 8))
    assert [(8 * start, min(8 * stop, size)) for start, stop in latents] == tiling.spans(size)


RATIOS = st.sampled_from([Fraction(1, 4), Fraction(1), Fraction(2)])


@settings(max_examples=4)
@given(st.data(), RATIOS)
def test_shares_in_every_pixel_sum_to_one(noise, data, ratio):
    tiling = data.draw(tilings(ratio.denominator, most=6))
    height, width = (data.draw(st.integers(1, 4 * tiling.tile)) for _ in range(2))
    x = noise((1, 1, height, width, 2))
    tiled, _ = in_lossy_tiles(local_step(ratio), tiling, ratio)(x, None)
    assert close(tiled, local_step(ratio)(x, None)[0], 4)


@settings(max_examples=4)
@given(st.data(), RATIOS)
def test_tiles_are_blended_as_the_public_algorithm_does(noise, data, ratio):
    tiling = data.draw(tilings(ratio.denominator, most=6))
    height, width = (data.draw(st.integers(1, 4 * tiling.tile)) for _ in range(2))
    x = noise((1, 2, height, width, 2))
    step = tile_wide_step(ratio)
    tiled, _ = in_lossy_tiles(step, tiling, ratio)(x, None)
    expected = public_algorithm(lambda tile: step(tile, None)[0], np.asarray(x), tiling, ratio)
    assert close(tiled, expected, 8)
    assert len(tiling.spans(height)) * len(tiling.spans(width)) == 1 or not close(tiled, step(x, None)[0], 1000)


def test_every_tile_has_a_carry_of_its_own(noise, stream):
    x = noise((2, 7, 17, 23, 3))
    tiled = in_lossy_tiles(adding_step, TILING, Fraction(1))
    whole, _ = tiled(x, None)
    assert close(whole, jnp.cumsum(x, axis=1), 16)
    chunked, carry = stream(tiled, x, (1, 2, 4))
    assert close(chunked, whole, 16)
    assert sum(leaf.shape[0] for leaf in jax.tree.leaves(carry)) == 3 * 4
    forgetful, _ = stream(tiled, x, (1, 2, 4), tamper=partial(jax.tree.map, jnp.zeros_like))
    assert not close(forgetful, whole, 1000)


@pytest.mark.parametrize(
    ("tile", "overlap"), [(8, 0), (8, 5), (8, -2), (0, 0), (1, 1), (8.0, 2), (8, 2.0)], ids=lambda value: str(value)
)
def test_a_tiling_without_room_to_blend_is_refused(tile, overlap, unchecked):
    with pytest.raises(ValueError, match=rf"tile={tile}, overlap={overlap}: expected .* half a tile"):
        LossyTiling(tile, overlap)


@pytest.mark.parametrize("tiling", [LossyTiling(9, 2), LossyTiling(8, 3)], ids=str)
def test_tiles_of_broken_latents_are_refused(vae, tiling):
    with pytest.raises(ValueError, match="multiples of 2"):
        LossyTiles(vae, tiling)


def test_a_step_of_another_ratio_is_refused(noise):
    with pytest.raises(ValueError, match=r"makes \(16, 16\) of \(8, 8\): expected 4 times"):
        in_lossy_tiles(local_step(Fraction(2)), TILING, Fraction(4))(noise((1, 1, 20, 20, 1)), None)


def test_a_carry_of_frames_of_another_size_is_refused(noise):
    tiled = in_lossy_tiles(adding_step, TILING, Fraction(1))
    _, carry = tiled(noise((1, 1, 17, 23, 1)), None)
    with pytest.raises(ValueError, match="not of frames of 20x20 in tiles of 8"):
        tiled(noise((1, 1, 20, 20, 1)), carry)


def test_a_shape_of_tile_is_traced_once(noise):
    traced = []

    class Double(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.array(2.0))

        def __call__(self, x, carry=None):
            traced.append((*x.shape[2:4], carry is None))
            return x * self.weight[...], x[:, -1:]

    tiled, x = TiledModule(Double(), TILING, Fraction(1)), noise((1, 2, 41, 35, 1))
    for _ in range(2):
        y, carry = tiled(x)
        assert close(y, 2 * x, 4)
        tiled(x, carry)
    shapes = [(8, 8), (8, 5), (5, 8), (5, 5)]
    assert sorted(traced) == sorted((*shape, start) for shape in shapes for start in (True, False))


@pytest.fixture(scope="module")
def vae(randomized):
    return randomized(lambda rngs: CausalVideoVAE(ONE_BLOCK, rngs=rngs))  # a latent spans 2 frames and 2x2 pixels


@pytest.fixture(scope="module")
def lossy(vae):
    return LossyTiles(vae, TILING)


def video(frames=5, height=20, width=14, seed=0):
    values = np.random.default_rng(seed).uniform(-1, 1, (1, frames, height, width, 3))
    return jnp.asarray(values, jnp.float32)


def test_the_model_blends_moments_and_frames_as_the_public_algorithm_does(vae, lossy):
    loud = nnx.clone(vae)
    loud.quant_conv.conv.kernel[...] *= 40  # so that logvar is clamped
    posterior = LossyTiles(loud, TILING).encode(video())
    moments = stream.compiled(loud.moments_chunk)
    blended = public_algorithm(lambda tile: moments(tile, None)[0], video(), TILING, Fraction(1, 2))
    mean, logvar = np.split(blended, 2, axis=-1)
    assert logvar.min() < -30 < 20 < logvar.max()
    assert close(posterior.mean, mean, 64)
    assert close(posterior.logvar, logvar.clip(-30, 20), 64)

    latents = lossy.encode(video()).mean
    decode = stream.compiled(vae.decode_chunk)
    expected = public_algorithm(lambda tile: decode(tile, None)[0], latents, LossyTiling(4, 1), Fraction(2))
    assert close(lossy.decode(latents), expected, 64)


def test_a_clip_within_one_tile_is_encoded_and_decoded_exactly(vae, lossy):
    clip = video(height=7, width=8)
    latents, _ = stream.compiled(vae.encode_chunk)(clip, None)
    tiled, _ = stream.compiled(lossy.encode_chunk)(clip, None)
    assert np.array_equal(tiled.mean, latents.mean)
    assert np.array_equal(tiled.logvar, latents.logvar)
    frames, _ = stream.compiled(vae.decode_chunk)(latents.mean, None)
    assert np.array_equal(stream.compiled(lossy.decode_chunk)(latents.mean, None)[0], frames)


def test_tiles_in_chunks_and_in_streams_are_those_of_the_whole_clip(lossy):
    clip = video()
    latents = lossy.encode(clip).mean
    assert latents.shape == (1, 3, 10, 7, 2)
    assert close(lossy.encode(clip, chunk=2).mean, latents, 64)
    streamed = list(stream.encode(lossy, [clip[:, :1], clip[:, 1:3], clip[:, 3:]]))
    assert close(np.concatenate([p.mean for p in streamed], axis=1), latents, 64)


@pytest.mark.slow
def test_tiles_of_latents_in_chunks_and_in_streams_are_those_of_the_whole_clip(lossy):
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 10, 7, 2)), jnp.float32)
    frames = lossy.decode(latents)
    assert frames.shape == video().shape
    assert close(lossy.decode(latents, chunk=1), frames, 64)
    assert close(np.concatenate(list(stream.decode(lossy, [latents[:, :1], latents[:, 1:]])), axis=1), frames, 64)


def test_an_interrupted_stream_of_tiles_goes_on_to_the_same_bits(lossy, tmp_path):
    chunks = [video()[:, :1], video()[:, 1:3], video()[:, 3:]]
    whole = [p.mean for p in stream.encode(lossy, chunks)]
    interrupted = stream.encode(lossy, chunks)
    next(interrupted)
    next(interrupted)
    trees.save_tree(tmp_path / "carry", interrupted.carry)
    carry, _ = trees.load_tree(tmp_path / "carry")
    (last,) = stream.encode(lossy, chunks[2:], carry)
    assert np.array_equal(last.mean, whole[2])


def test_remat_gives_the_same_tiles(vae, lossy):
    remat = nnx.clone(vae)
    remat.execution = Execution(remat=True)
    assert close(LossyTiles(remat, TILING).encode(video()).mean, lossy.encode(video()).mean, 64)


@pytest.mark.slow
def test_a_gradient_goes_through_tiles_and_chunks(vae, noise, jit):
    latents = noise((1, 3, 7, 10, 2))

    def gradient(chunk):
        def loss(vae):
            return jnp.square(LossyTiles(vae, TILING).decode(latents, chunk)).mean()

        return jax.tree.leaves(jit(nnx.grad(loss), vae)())

    whole, chunked = gradient(None), gradient(1)
    largest = max(np.abs(leaf).max() for leaf in whole)
    assert 0 < largest < np.inf
    assert max(np.abs(a - b).max() for a, b in zip(chunked, whole, strict=True)) <= 64 * ULP * largest


def scratch(module, function, x):
    """Returns the bytes that a compiled function of a module needs beside its input and output."""
    structure, state = nnx.split(module)
    program = jax.jit(lambda state, x: function(nnx.merge(structure, state), x)).lower(state, x).compile()
    return memory(program).temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shapes"), [(56, 1), (53, 4)])
def test_nine_tiles_take_a_fraction_of_the_memory(vae, size, shapes):
    tiling, clip = LossyTiling(24, 8), video(5, size, size)
    assert len(tiling.spans(size)) == 3
    assert len(tiles_by_shape(tiling, size, size)) == shapes
    lossy = LossyTiles(vae, tiling)
    tiled, whole = (scratch(model, lambda model, x: model.encode_chunk(x), clip) for model in (lossy, vae))
    assert tiled < 0.4 * whole
    latents = jnp.zeros((1, 3, -(-size // 2), -(-size // 2), 2))
    tiled, whole = (scratch(model, lambda model, z: model.decode_chunk(z), latents) for model in (lossy, vae))
    assert tiled < 0.4 * whole


def test_a_whole_clip_in_chunks_holds_no_carry_but_one_tiles(vae):
    lossy, latents = LossyTiles(vae, LossyTiling(24, 8)), jnp.zeros((1, 17, 44, 44, 2))
    _, carry = jax.eval_shape(lossy.decode_chunk, latents)
    carries = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
    chunked = scratch(lossy, lambda model, z: model.decode(z, chunk=1), latents)
    assert chunked < 0.5 * scratch(lossy, lambda model, z: model.decode(z), latents)
    assert chunked < 0.7 * carries


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_whole_clip_of_any_length_is_padded(lossy, frames):
    clip = video(frames)
    latents = jax.eval_shape(lambda clip: lossy.encode(clip, extra_frames="pad").mean, clip)
    assert latents.shape == (1, math.ceil((frames - 1) / 2) + 1, 10, 7, 2)


@pytest.mark.parametrize("chunk", [-2, 0, 3])
def test_a_chunk_of_broken_latents_is_refused(lossy, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk}: expected a multiple of 2"):
        lossy.encode(video(), chunk)
    if chunk < 1:
        with pytest.raises(ValueError, match=f"chunk={chunk}: expected at least 1 latent"):
            lossy.decode(video()[..., :2], chunk)


@pytest.mark.slow
def test_psnr_is_that_of_tiles_against_none(vae, lossy):
    clip = video(3)
    tiled, whole = (model.decode(model.encode(clip, chunk=2).mode(), chunk=1) for model in (lossy, vae))
    assert lossy_psnr(vae, LossyTiles(vae, TILING), clip, chunk=2) == pytest.approx(psnr(tiled, whole), abs=1e-3)
    assert 0 < psnr(tiled, whole) < 60
