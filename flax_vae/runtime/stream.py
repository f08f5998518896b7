"""Streams of any length through a model, one chunk at a time.

A step is a function (chunk, carry) -> (result, carry), such as `vae.encode_chunk`; at the start of a stream its
carry is None. A stream has no other state, so any number of them can run through one step side by side.
"""

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

Step = Callable[[Any, Any], tuple[Any, Any]]


def compiled(method: Step) -> Step:
    """Compiles a step that is a method of an nnx module, once for every shape of chunk, with the weights as they are.

    Keep what it returns: compiling the same method again starts from nothing.
    """
    module, function = method.__self__, method.__func__
    structure, state = nnx.split(module)

    @jax.jit
    def run(state, chunk, carry):
        return function(nnx.merge(structure, state), chunk, carry)

    return functools.partial(run, state)  # as an argument: weights inside the program would be compiled as constants


def stream(step: Step, chunks: Iterable, carry: Any = None) -> Generator[Any, None, Any]:
    """Yields the result of every chunk, and holds no chunk or result but the latest.

    It goes on from `carry`, and returns the last one (the value of `yield from`) for a stream to go on from later.
    """
    for chunk in chunks:
        result, carry = step(chunk, carry)
        yield result
        del chunk, result  # before the next chunk is made
    return carry


def cut(frames: Iterable[ArrayLike], size: int) -> Iterator[np.ndarray]:
    """Stacks frames to chunks: the first of size + 1 frames, later ones of `size`, the last of what is left.

    With a `size` that is a multiple of the model's temporal factor every chunk but the last gives whole latents.
    Latent frames are cut the same way. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"a chunk needs at least 1 frame, got size={size}")
    return _cut(iter(frames), size)


def _cut(frames, size):
    chunk = list(itertools.islice(frames, size + 1))
    while chunk:
        yield np.stack(chunk)
        chunk = list(itertools.islice(frames, size))
