"""Streams: the same numbers as the whole clip, no state but the carry, one chunk ahead, nothing lost.

A plan is the number of latents of every chunk; `count` tells how many frames, or latents, so many latents stand for.
"""

import dataclasses
import gc
import inspect
import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE
from flax_vae.io.trees import load_tree, save_tree
from flax_vae.runtime import stream
from tests.little import CONFIG

hypothesis = pytest.importorskip("hypothesis", reason="plans are drawn by hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")

LATENTS, FACTOR = 5, CONFIG.temporal_factor
PLANS = (
    st.tuples(st.sampled_from((1, 2)), st.lists(st.sampled_from((1, 2)), max_size=4))
    .map(lambda drawn: (drawn[0], *drawn[1]))
    .filter(lambda plan: sum(plan) <= LATENTS)
)


@pytest.fixture(scope="module")
def vae(randomized):
    """A model in float32."""
    return cast(randomized(lambda rngs: CausalVideoVAE(CONFIG, rngs=rngs)), "float32")


def cast(vae, dtype):
    structure, state = nnx.split(vae)
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def count(latents, factor):
    return factor * (latents - 1) + 1 if latents else 0


def joined(results):
    """Joins frames, or the mean and logvar of posteriors, in time."""
    arrays = [
        np.concatenate([result.mean, result.logvar], axis=-1) if hasattr(result, "logvar") else np.asarray(result)
        for result in results
    ]
    return np.concatenate(arrays, axis=1)


@dataclasses.dataclass(repr=False)
class Coder:
    """A model in one direction: what starts a stream, its step, and how many frames a latent stands for."""

    vae: CausalVideoVAE
    start: Callable
    step: Callable
    channels: int
    factor: int
    factor_out: int
    tolerance: float

    def clip(self, seed=0, latents=LATENTS):
        shape = (1, count(latents, self.factor), 5, 6, self.channels)
        return np.random.default_rng(seed).uniform(-1, 1, shape).astype(self.vae.dtype)

    def chunks(self, plan, seed=0):
        ends = [count(latents, self.factor) for latents in itertools.accumulate(plan, initial=0)]
        return [self.clip(seed)[:, start:end] for start, end in itertools.pairwise(ends)]

    def run(self, plan, seed=0):
        return joined(self.start(self.vae, self.chunks(plan, seed)))

    def whole(self, latents=LATENTS, seed=0):
        return self.run((LATENTS,), seed)[:, : count(latents, self.factor_out)]

    def check(self, results, latents=LATENTS):
        """AssertionError unless the results are those of the whole clip, of its first latents."""
        expected = self.whole(latents)
        assert (results.shape, results.dtype) == (expected.shape, expected.dtype)
        assert np.abs(results - expected).max() <= self.tolerance * np.abs(expected).max()


def coder(vae, direction):
    tolerance = {"float64": 1e-12, "float32": 16 * np.finfo(np.float32).eps}[vae.dtype.name]
    if direction == "encode":
        return Coder(vae, stream.encode, vae.encode_chunk, 3, FACTOR, 1, tolerance)
    return Coder(vae, stream.decode, vae.decode_chunk, CONFIG.latent_channels, 1, FACTOR, tolerance)


@pytest.fixture(scope="module", params=["encode", "decode"])
def direction(request):
    return request.param


@pytest.fixture(scope="module")
def code(vae, direction):
    """A direction in float32."""
    return coder(vae, direction)


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@settings(max_examples=8)
@given(plan=PLANS)
@hypothesis.example(plan=(1, 1, 1, 1, 1))
def test_chunks_give_what_the_whole_clip_gives_and_a_prefix_a_prefix(vae, direction, dtype, plan):
    code = coder(cast(vae, dtype), direction)
    code.check(code.run(plan), sum(plan))


def test_a_latent_knows_nothing_of_later_frames_and_a_frame_of_later_latents(code):
    for kept in range(1, LATENTS):
        changed = code.clip()
        changed[:, count(kept, code.factor) :] *= -2
        results, whole = joined(code.start(code.vae, [changed])), code.whole()
        same = count(kept, code.factor_out)
        assert np.array_equal(results[:, :same], whole[:, :same])
        assert not np.isclose(results[:, same:], whole[:, same:]).all(axis=(0, 2, 3, 4)).any()


def test_first_latent_of_a_clip_is_that_of_its_first_image(code):
    code.check(code.run((1,)), 1)


@settings(max_examples=4)
@given(plans=st.lists(PLANS, min_size=2, max_size=3), data=st.data())
def test_streams_side_by_side_give_what_each_gives_alone(code, plans, data):
    streams = [code.start(code.vae, code.chunks(plan, seed)) for seed, plan in enumerate(plans)]
    results: list[list[Any]] = [[] for _ in plans]
    for i in data.draw(st.permutations([i for i, plan in enumerate(plans) for _ in plan]), "order"):
        results[i].append(next(streams[i]))
    for seed, plan in enumerate(plans):
        assert np.array_equal(joined(results[seed]), code.run(plan, seed))
    first, second = (joined(results[seed][:1])[:, :1] for seed in (0, 1))
    assert not np.array_equal(first, second)


@settings(max_examples=8)
@given(plan=PLANS, data=st.data())
def test_a_stream_gone_on_with_from_its_saved_carry_gives_the_bits_of_one_that_never_stopped(
    code, tmp_path_factory, plan, data
):
    path = tmp_path_factory.mktemp("carry") / "carry.safetensors"
    begun = code.start(code.vae, code.chunks(plan))
    results = [next(begun) for _ in range(data.draw(st.integers(0, len(plan) - 1), "results before the stop"))]
    save_tree(path, begun.carry)
    rest = code.start(code.vae, code.chunks(plan)[len(results) :], load_tree(path)[0])
    assert np.array_equal(joined([*results, *rest]), code.run(plan))


GO_ON = """
import sys
import numpy as np
from flax_vae import CausalVideoVAE
from flax_vae.io.trees import load_tree, save_tree
from flax_vae.runtime import stream

folder = sys.argv[1]
vae, carry = CausalVideoVAE.from_pretrained(folder), load_tree(f"{folder}/carry.safetensors")[0]
(frames,) = stream.decode(vae, [np.load(f"{folder}/chunk.npy")], carry)
save_tree(f"{folder}/frames.safetensors", frames)
"""


def test_another_process_goes_on_to_the_same_bits(vae, tmp_path, monkeypatch):
    # Bits are those of a program: both processes are to have it compiled alike.
    monkeypatch.setattr(stream, "_call", jax.jit(inspect.unwrap(stream._call), static_argnums=(0, 1)))
    code = coder(vae, "decode")
    vae.save_pretrained(tmp_path)
    begun = code.start(vae, code.chunks((1, 2)))
    next(begun)
    save_tree(tmp_path / "carry.safetensors", begun.carry)
    np.save(tmp_path / "chunk.npy", code.chunks((1, 2))[1])
    subprocess.run([sys.executable, "-c", GO_ON, tmp_path], check=True, cwd=Path(__file__).parents[2])
    frames = load_tree(tmp_path / "frames.safetensors")[0]
    assert frames.dtype == np.float32
    assert np.array_equal(frames, next(begun))


def run_with(code, plan, tamper=lambda carries: carries[-1], first=None):
    """Runs chunks with a carry made of all those before; `first` is that of the first chunk."""
    step, carries, results = stream.compiled(code.step), [first], []
    for chunk in code.chunks(plan):
        result, carry = step(chunk, carries[0] if len(carries) == 1 else tamper(carries))
        results.append(result)
        carries.append(carry)
    return joined(results)


ONES = (1,) * LATENTS
MISTAKES = {
    "carry of zeros": lambda carries: jax.tree.map(jnp.zeros_like, carries[-1]),
    "carry of the chunk before": lambda carries: carries[-2] if len(carries) > 2 else carries[-1],
    "carry shifted by a frame": lambda carries: jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), carries[-1]),
    "carry of another clip": lambda carries: jax.tree.map(lambda x: -x, carries[-1]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_carry_is_noticed(code, mistake):
    code.check(run_with(code, ONES))
    with pytest.raises(AssertionError):
        code.check(run_with(code, ONES, MISTAKES[mistake]))


def test_swapped_chunks_are_noticed(code):
    chunks = code.chunks(ONES)
    with pytest.raises(AssertionError):
        code.check(joined(code.start(code.vae, [*chunks[:2], chunks[3], chunks[2], chunks[4]])))


def test_a_first_frame_that_is_not_dropped_is_noticed(vae):
    code = coder(vae, "decode")
    _, carry = stream.compiled(code.step)(code.chunks(ONES)[0], None)
    frames = run_with(code, ONES, first=jax.tree.map(jnp.zeros_like, carry))
    assert frames.shape[1] == LATENTS * FACTOR
    with pytest.raises(AssertionError):
        code.check(frames)
    with pytest.raises(AssertionError):
        code.check(frames[:, FACTOR - 1 :])


@settings(max_examples=12)
@given(frames=st.integers(1, 21), first=st.sampled_from((1, 5)))
def test_frames_that_complete_no_latent_are_refused_or_padded_or_left_out_as_asked(vae, frames, first):
    clip = np.random.default_rng(1).uniform(-1, 1, (frames, 5, 6, 3)).astype(np.float32)

    def encoded(clip, policy):
        given = []
        for posterior in stream.encode(
            vae, (chunk[None] for chunk in stream.cut(clip, FACTOR, first)), extra_frames=policy
        ):
            given.append(posterior.mean)  # one by one: some come before the error
        return np.concatenate(given, axis=1)

    over = (frames - 1) % FACTOR
    longer = np.concatenate([clip, np.repeat(clip[-1:], (FACTOR - over) % FACTOR, axis=0)])
    shorter = clip[: frames - over]
    assert np.array_equal(encoded(clip, "pad"), encoded(longer, "error"))
    assert np.array_equal(encoded(clip, "trim"), encoded(shorter, "error"))
    assert encoded(clip, "pad").shape[1] == -(-(frames - 1) // FACTOR) + 1
    if over:
        with pytest.raises(ValueError, match=f"got .*extra_frames='pad' repeats the last, 'trim' leaves {over} out"):
            encoded(clip, "error")


@pytest.mark.parametrize("policy", ["error", "pad", "trim"])
def test_a_short_chunk_before_the_last_is_an_error_after_the_results_before_it(vae, policy):
    code = coder(vae, "encode")
    first, short, last = code.clip()[:, :5], code.clip()[:, 5:8], code.clip()[:, 8:12]
    running = stream.encode(vae, [first, short, last], extra_frames=policy)
    assert np.array_equal(joined([next(running)]), code.run((2,)))
    with pytest.raises(
        ValueError, match=r"got 3; extra_frames='pad'|a chunk that is not the last has 3 frames, expected 4k"
    ):
        next(running)
    rest = stream.encode(vae, [code.clip()[:, 5:9]], running.carry)
    assert np.array_equal(joined(rest), code.run((2, 1))[:, 2:])


@pytest.mark.parametrize("policy", ["error", "pad", "trim"])
def test_a_stream_of_chunks_without_frames_is_refused(vae, policy):
    with pytest.raises(ValueError, match=r"at least one frame, got \(1, 0, 5, 6, 3\)"):
        list(stream.encode(vae, [np.zeros((1, 0, 5, 6, 3), np.float32)], extra_frames=policy))
    assert list(stream.encode(vae, [], extra_frames=policy)) == []


@pytest.mark.usefixtures("unchecked")
def test_another_policy_is_refused_by_name(vae):
    with pytest.raises(ValueError, match="extra_frames must be one of error, pad, trim, got 'crop'"):
        list(stream.encode(vae, coder(vae, "encode").chunks(ONES), extra_frames="crop"))  # pyright: ignore[reportArgumentType]


def test_streaming_leaves_no_state_on_the_model(code):
    structure, before = nnx.split(code.vae)
    for _ in zip(*(code.start(code.vae, code.chunks(ONES, seed)) for seed in (1, 2)), strict=True):
        after = nnx.split(code.vae)
        assert after[0] == structure
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, (after[1], before)), strict=True))


def test_programs_are_made_once_for_every_shape_of_chunk_and_shared(code, randomized):
    programs: Any = stream._call  # a jitted function
    plans = [(1, 2, 1), (2, 1, 2), (1, 1)]
    wanted = [code.run(plan) for plan in plans]
    made = programs._cache_size()
    built_alike = cast(randomized(lambda rngs: CausalVideoVAE(CONFIG, rngs=rngs), seed=5), "float32")
    for vae in (code.vae, built_alike):
        streams = [code.start(vae, code.chunks(plan)) for plan in plans]
        results = [joined(results) for results in streams]
        assert all(np.array_equal(*pair) for pair in zip(results, wanted, strict=True)) == (vae is code.vae)
    assert programs._cache_size() == made
    next(code.start(code.vae, [chunk[:, :, :4] for chunk in code.chunks((1,))]))
    assert programs._cache_size() == made + 1


def aligned(shape):
    """An array that XLA's CPU programs read where it lies."""
    size = 4 * int(np.prod(shape))
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def test_a_reader_may_fill_one_and_the_same_array_with_every_chunk(vae):
    clip = np.random.default_rng(0).uniform(-1, 1, (1, 17, 64, 64, 3)).astype(np.float32)
    array = aligned((1, 4, 64, 64, 3))

    def chunks():
        yield clip[:, :1]
        for start in range(1, 17, 4):
            array[...] = clip[:, start : start + 4]
            yield array
        array[...] = np.nan

    apart = [clip[:, :1], *(clip[:, start : start + 4] for start in range(1, 17, 4))]
    assert np.array_equal(joined(stream.encode(vae, chunks())), joined(stream.encode(vae, apart)))


def total(chunk, carry):
    """A step whose result and carry are the sum of all chunks so far."""
    carry = chunk.sum() + (0 if carry is None else carry)
    return carry, carry


def test_the_next_chunk_is_read_and_begun_before_a_result_is_given_and_no_more():
    events = []

    def chunks():
        for i in range(3):
            events.append(f"read {i}")
            yield np.array([i])

    def step(chunk, carry):
        events.append(f"begin {int(chunk[0])}")
        return int(chunk[0]), None

    for result in stream.Stream(step, chunks()):
        events.append(f"given {result}")
    assert events == [
        *("read 0", "begin 0"),
        *("read 1", "begin 1", "given 0"),
        *("read 2", "begin 2", "given 1"),
        "given 2",
    ]


class Queue:
    """A device that computes only what is waited for, in the order of dispatch; counts what it has not computed yet."""

    def __init__(self, lost=None):
        self.dispatched, self.done, self.lost = 0, 0, lost

    def step(self, chunk, carry):
        self.dispatched += 1
        return Pending(self, self.dispatched), Pending(self, self.dispatched)

    @property
    def waiting(self):
        return self.dispatched - self.done


@dataclasses.dataclass
class Pending:
    """What a program returns; `number` is that of its dispatch."""

    queue: Queue
    number: int

    def block_until_ready(self):
        if self.number == self.queue.lost:
            raise OSError("device lost")
        self.queue.done = max(self.queue.done, self.number)
        return self


def no_wait(results):
    return results


@pytest.mark.parametrize("read", [no_wait, jax.block_until_ready], ids=["does not wait", "waits"])
def test_a_stream_is_one_chunk_ahead_of_a_reader_that_waits_and_of_one_that_does_not(read):
    queue, given = Queue(), 0
    for result in stream.Stream(queue.step, map(np.array, range(8))):
        given += 1
        assert (result.number, queue.dispatched) == (given, min(given + 1, 8))
        assert queue.waiting == (given < 8)  # the next chunk is computed while the reader works, no other
        read(result)
    assert given == 8


def test_running_further_ahead_would_be_noticed(monkeypatch):
    monkeypatch.setattr(stream, "_computed", no_wait)
    queue = Queue()
    assert [queue.waiting for _ in stream.Stream(queue.step, map(np.array, range(8)))] == [2, 3, 4, 5, 6, 7, 8, 8]


def test_results_of_a_model_are_computed_when_they_are_given(code):
    for result in code.start(code.vae, code.chunks(ONES)):
        assert all(leaf.is_ready() for leaf in jax.tree.leaves(result))


def test_a_chunk_that_fails_on_the_device_is_an_error_after_the_results_before_it():
    queue, numbers = Queue(lost=3), []
    running = stream.Stream(queue.step, map(np.array, range(8)))
    with pytest.raises(OSError, match="device lost"):
        numbers.extend(result.number for result in running)
    assert (numbers, running.carry.number) == ([1, 2], 2)


def test_a_stream_holds_one_chunk_one_result_ahead_and_nothing_older():
    arrays: list[weakref.ref] = []

    def seen(array):
        arrays.append(weakref.ref(array))
        return array

    def count_alive():
        gc.collect()
        return sum(ref() is not None for ref in arrays)

    def frames():
        for i in range(16):
            if i % 4 == 1:  # of all chunks before, only the result that waits to be given is left
                assert count_alive() <= 1
            yield np.full(3, i)

    def step(chunk, carry):
        assert count_alive() <= 1
        return seen(np.asarray(seen(chunk) + 1)), None

    def batch(frames):
        return seen(frames)[None]

    chunks = stream.fitted(map(batch, stream.cut(frames(), 4)), CONFIG, "pad")
    gc.freeze()  # what is here already: each collection would go through all that other tests have left
    for result in stream.Stream(step, chunks):
        assert count_alive() <= 2
        del result
    assert len(arrays) == 15


@pytest.mark.parametrize("error", [OSError("torn tape"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_in_reading_leaves_a_carry_to_go_on_from(error):
    def chunks():
        yield from (np.full(2, 1.0), np.full(2, 10.0))
        raise error

    running, results = stream.Stream(total, chunks()), []
    with pytest.raises(type(error)):
        results.extend(map(float, running))
    assert results == [2.0, 22.0][: len(results)]
    assert isinstance(error, KeyboardInterrupt) or len(results) == 2
    assert running.carry == (results[-1] if results else None)
    assert list(running) == []
    rest = [np.full(2, 1.0), np.full(2, 10.0), np.full(2, 100.0)][len(results) :]
    assert float([*stream.Stream(total, rest, running.carry)][-1]) == 222.0


def test_an_error_in_computing_comes_after_the_results_before_it(vae):
    code = coder(vae, "encode")
    first, second, third = code.chunks((1, 1, 1))
    running = stream.encode(vae, [first, second, third[:, :, :3]])
    assert np.array_equal(joined([next(running), next(running)]), code.run((1, 1)))
    with pytest.raises(ValueError, match="does not continue into a chunk of shape"):
        next(running)
    assert np.array_equal(joined(stream.encode(vae, [third], running.carry)), code.run((1, 1, 1))[:, 2:])


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 5))
def test_cut_keeps_every_frame_in_order(frames, size, first):
    chunks = list(stream.cut(np.arange(frames * 2).reshape(frames, 2), size, first))
    assert np.array_equal(np.concatenate([np.zeros((0, 2)), *chunks]), np.arange(frames * 2).reshape(frames, 2))
    lengths = [len(chunk) for chunk in chunks]
    assert all(lengths)
    assert lengths[:-1] == [first, *[size] * len(lengths)][: max(len(lengths) - 1, 0)]
    assert all(length <= most for length, most in zip(lengths, [first, *[size] * len(lengths)], strict=False))


def test_cut_reads_no_further_than_the_chunk_it_gives():
    counter = itertools.count()
    chunks = stream.cut((np.array(next(counter)) for _ in range(100)), 8, first=9)
    next(chunks)
    assert next(counter) == 9


@pytest.mark.parametrize(("size", "first"), [(0, 1), (8, 0), (-8, 9)])
def test_a_chunk_of_no_frames_is_refused(size, first):
    with pytest.raises(ValueError, match=f"size={size}, first={first}"):
        stream.cut([], size, first)
