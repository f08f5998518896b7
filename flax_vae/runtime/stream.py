"""Streams of any length through a model, one chunk at a time: B batch, T frames, H W pixels, C channels.

A step is a function (chunk, carry) -> (result, carry), such as `vae.encode_chunk`; at the start of a stream its
carry is None. A stream has no other state, so any number of them can run through one step side by side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from flax_vae.models.config import ExtraFrames, VAEConfig
from flax_vae.models.vae import fit_frames
from flax_vae.runtime.heaps import trim_heaps
from flax_vae.runtime.parallel import replicate, run_step, shard_step

Step = Callable[[Any, Any], tuple[Any, Any]]  # (clip or chunk, carry) -> (result, carry)
MIN_TRIMMED_BYTES = 16 * 2**20  # of a result and its carry: trimming takes time, and streams of less do not grow


def encode(
    vae: Any,
    chunks: Iterable[ArrayLike],
    carry: Any = None,
    extra_frames: ExtraFrames = "error",
    mesh: Mesh | None = None,
) -> Stream:
    """Encodes a video of any length: yields the distribution of latents of every chunk, in order.

    Args:
      vae: a `VideoVAE` whose config says that it `streams`, or `LossyTiles` of one.
      chunks: (B, T, H, W, C), pixels in [-1, 1]; T = 8k + 1 at the start of the stream and 8k later on, for a
        temporal factor of 8. They are read as they are needed, at most one ahead of what is yielded; one and the same
        numpy array may be refilled for each.
      carry: None at the start of a stream, or the `carry` of a stream to continue.
      extra_frames: for a last chunk of another length: "error" raises ValueError, "pad" repeats its last frame, "trim"
        leaves out the frames that do not complete a latent.
      mesh: devices that share each chunk (`flax_vae.make_mesh`); they must divide its rows, columns and latents.

    Raises:
      ValueError: the model cannot be computed in chunks; when iterated, a chunk without whole latents.
    """
    return Stream(compiled(vae.encode_chunk, mesh), fitted(chunks, vae.config, extra_frames, carry is None), carry)


def decode(vae: Any, chunks: Iterable[ArrayLike], carry: Any = None, mesh: Mesh | None = None) -> Stream:
    """Decodes latents of any length: yields the frames (B, T, H, W, C) of every chunk (B, t, h, w, z), in order.

    A chunk has one latent or more. The other arguments, and what is read when, are as in `encode`.
    """
    vae.config.checked_chunk(vae.config.temporal_factor)
    return Stream(compiled(vae.decode_chunk, mesh), chunks, carry)


class Stream(Iterator):
    """Iterates over the results of a step for a sequence of chunks.

    `carry` is the state of the stream after the result that was yielded last: a pytree from which the stream can be
    continued at any time, in another process too, to the same bits (`flax_vae.io.trees` writes and reads it).

    The next chunk is read and dispatched to the device before a result is yielded: the device computes while the caller
    reads and writes. What is yielded is computed, so that a stream is never more than that one chunk ahead of its
    caller. An error in reading a chunk is raised after the results of the chunks before it.
    """

    def __init__(self, step: Step, chunks: Iterable, carry: Any = None):
        self.carry = carry
        self._results = _one_ahead(step, chunks, carry)

    def __next__(self) -> Any:
        result, self.carry = next(self._results)
        return result


def _one_ahead(step, chunks, carry):
    before = ()
    try:
        for chunk in chunks:
            # jax may alias a numpy array, and read it after the call returned and the reader has refilled it
            chunk = chunk.copy() if isinstance(chunk, np.ndarray) else chunk
            after = step(chunk, carry)
            carry = after[1]
            del chunk
            yield from _computed(before)
            before = (after,)
    except Exception:  # in reading or computing the next chunk; the result before it is whole
        yield from _computed(before)
        raise
    yield from _computed(before)


def _computed(results):
    """Waits for results: jax queues any number of programs, whose results all take memory, if nobody waits for one."""
    jax.block_until_ready(results)
    size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(results))
    if size >= MIN_TRIMMED_BYTES and jax.default_backend() == "cpu":
        trim_heaps()
    return results


def compiled(method: Step, mesh: Mesh | None = None) -> Compiled:
    """Compiles a step that is a method of an nnx module, once for every shape of chunk, with the weights as they are.

    Modules of one structure share the programs. The devices of a `mesh` share each chunk.
    """
    structure, state = nnx.split(method.__self__)
    state = state if mesh is None else replicate(state, mesh)
    return Compiled(_call, method.__func__, mesh, structure, state)


class Compiled(functools.partial):
    """A step that is compiled when it is first called with chunks of a shape, or ahead of that."""

    def __call__(self, chunk: Any, carry: Any) -> tuple[Any, Any]:
        """Runs the step."""
        return self.func(*self.args, *self._sharded(chunk, carry))

    def trace(self, chunk: Any, carry: Any) -> jax.stages.Traced:
        """Traces the program for a chunk and a carry, or for their shapes, to be inspected and compiled."""
        return self.func.trace(*self.args, *self._sharded(chunk, carry))

    def _sharded(self, chunk: Any, carry: Any) -> tuple[Any, Any]:
        return (chunk, carry) if self.args[1] is None else shard_step(chunk, carry, self.args[1])  # [1]: the mesh


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(function, mesh, structure, state, chunk, carry):  # weights in a closure would be compiled as constants
    module = nnx.merge(structure, state)
    return function(module, chunk, carry) if mesh is None else run_step(module, function, chunk, carry, mesh)


def fitted(
    chunks: Iterable[ArrayLike], config: VAEConfig, extra_frames: ExtraFrames, start: bool = True
) -> Iterator[ArrayLike]:
    """Yields chunks (B, T, ...) of whole latents: the last one padded or trimmed, chunks without frames left out.

    With `start` the first chunk is that of a stream. Raises ValueError where another chunk than the last has no whole
    latents, or a stream starts without a frame.
    """
    config.checked_chunk(config.temporal_factor)
    chunks, starts = iter(chunks), itertools.chain([start], itertools.repeat(False))

    def fit(chunk: Any, start: bool) -> Any:
        if start and not chunk.shape[1]:
            raise ValueError(f"a stream must start with at least one frame, got {tuple(chunk.shape)}")
        length = config.fitted_frames(chunk.shape[1], extra_frames, start)
        if length == chunk.shape[1]:
            return chunk
        if next(chunks, None) is not None:
            law = config.frame_law(start)
            raise ValueError(f"a chunk that is not the last has {chunk.shape[1]} frames, expected {law}")
        return fit_frames(chunk, length)

    # not a loop, whose variable would keep each chunk in memory while the caller computes with the next
    return filter(lambda chunk: chunk.shape[1], map(fit, chunks, starts))


def cut(frames: Iterable[ArrayLike], size: int, first: int = 1) -> Iterator[np.ndarray]:
    """Stacks frames, or latent frames, to chunks of `first` frames, then of `size`; the last has those that are left.

    A `size` that is a multiple of the model's temporal factor makes whole latents. Raises ValueError for one below 1.
    """
    if min(size, first) < 1:
        raise ValueError(f"a chunk needs at least 1 frame, got size={size}, first={first}")
    frames, lengths = iter(frames), itertools.chain([first], itertools.repeat(size))
    chunks = (list(itertools.islice(frames, length)) for length in lengths)
    return map(np.stack, itertools.takewhile(len, chunks))
