"""Streaming: the same numbers as the whole clip, no state but the carry, one program a shape of chunk."""

import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae.io import port
from flax_vae.models.config import narrow
from flax_vae.models.vae import CausalVideoVAE
from flax_vae.runtime.stream import compiled, cut, stream

hypothesis = pytest.importorskip("hypothesis", reason="plans are drawn by hypothesis")
given, st = hypothesis.given, hypothesis.strategies

CONFIG = narrow((8, 8, 16, 16), groups=4, encoder_layers=1, decoder_layers=1)


@pytest.fixture(scope="module")
def vae():
    model = nnx.eval_shape(lambda: CausalVideoVAE(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(3)
    shapes = {key: parameter.torch_shape for key, parameter in port.parameters(model).items()}
    port.load(model, port.Arrays({key: 0.2 * rng.standard_normal(shape) for key, shape in shapes.items()}))
    return model


@pytest.fixture(scope="module")
def steps(vae):
    return compiled(vae.encode_chunk), compiled(vae.decode_chunk)


def clip(seed: int, frames: int = 25) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (frames, 17, 24, 3)).astype(np.float32)


def batches(frames, size):
    return (chunk[None] for chunk in cut(frames, size))


def close(a, b):
    return np.abs(a - b).max() <= 32 * np.finfo(np.float32).eps * np.abs(b).max()


def test_streamed_latents_and_frames_equal_those_of_the_whole_clip(vae, steps):
    encode, decode = steps
    whole, _ = encode(clip(0)[None], None)
    posteriors = list(stream(encode, batches(clip(0), 8)))
    assert [p.mean.shape[1] for p in posteriors] == [2, 1, 1]
    mean = np.concatenate([p.mean for p in posteriors], axis=1)
    assert close(mean, whole.mean)
    assert close(np.concatenate([p.logvar for p in posteriors], axis=1), whole.logvar)

    video, _ = decode(whole.mean, None)
    frames = list(stream(decode, batches(whole.mean[0], 1)))
    assert [f.shape[1] for f in frames] == [9, 8, 8]
    assert close(np.concatenate(frames, axis=1), video)

    _, carry = decode(whole.mean[:, :2], None)
    forgetful, _ = decode(whole.mean[:, 2:3], jax.tree.map(jnp.zeros_like, carry))
    assert not close(forgetful, video[:, 9:17])


def test_two_interleaved_streams_do_not_touch_each_other(steps):
    encode, _ = steps
    alone = [[p.mean for p in stream(encode, batches(clip(seed), 8))] for seed in (1, 2)]
    both = zip(*(stream(encode, batches(clip(seed), 8)) for seed in (1, 2)), strict=True)
    for (a, b), (first, second) in zip(both, zip(*alone, strict=True), strict=True):
        assert np.array_equal(a.mean, first)
        assert np.array_equal(b.mean, second)
        assert not np.array_equal(first, second)


def test_stream_goes_on_from_the_carry_that_another_returned(steps):
    encode, _ = steps
    chunks = list(batches(clip(5), 8))
    whole = [p.mean for p in stream(encode, chunks)]

    def in_two_sessions():
        carry = yield from stream(encode, chunks[:2])
        yield from stream(encode, chunks[2:], carry)

    parts = [p.mean for p in in_two_sessions()]
    assert all(np.array_equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_a_step_is_compiled_once_for_every_shape_of_chunk():
    traced = []

    class Sum(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.array(2.0))

        def step(self, x, carry):
            traced.append(x.shape)
            total = x.sum() * self.weight[...] + (0 if carry is None else carry)
            return total, total

    step = compiled(Sum().step)
    for _ in range(2):
        results = stream(step, cut(np.ones((16, 3), np.float32), 4))
        assert [float(total) for total in results] == [30.0, 54.0, 78.0, 96.0]
    assert traced == [(5, 3), (4, 3), (3, 3)]


def test_stream_holds_only_the_latest_chunk_and_result():
    alive: list[weakref.ref] = []

    def tracked(array):
        alive.append(weakref.ref(array))
        return array

    def chunks():
        for i in range(4):
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            yield tracked(np.full(3, i))

    for result in stream(lambda chunk, carry: (tracked(chunk + 1), None), chunks()):
        assert sum(ref() is not None for ref in alive) == 2
        del result
    assert len(alive) == 8


@given(st.integers(0, 40), st.integers(1, 12))
def test_cut_keeps_every_frame_in_order(frames, size):
    chunks = list(cut(np.arange(frames * 2).reshape(frames, 2), size))
    assert np.array_equal(np.concatenate([np.zeros((0, 2)), *chunks]), np.arange(frames * 2).reshape(frames, 2))
    assert [len(c) for c in chunks[:-1]] == [size + 1, *[size] * (len(chunks) - 2)][: max(len(chunks) - 1, 0)]
    assert all(1 <= len(chunk) <= size + (chunk is chunks[0]) for chunk in chunks)


def test_cut_reads_no_further_than_the_chunk_it_gives():
    counter = itertools.count()
    chunks = cut((np.array(next(counter)) for _ in range(100)), 8)
    next(chunks)
    assert next(counter) == 9


def test_a_chunk_of_no_frames_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        cut([], 0)
