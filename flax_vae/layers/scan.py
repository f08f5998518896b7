"""A clip through a stateful step in chunks, inside one program: B batch, T frames, H W pixels, C channels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike

from flax_vae.layers.conv import Clip

Step = Callable[[Any, Clip, Any], tuple[Any, Any]]  # (module or several, chunk, carry) -> (result, carry)


def in_chunks(module: nnx.Module | tuple, step: Step, x: Clip, size: int, carry: Any = None) -> tuple[Any, Any]:
    """Gives what `step(module, x, carry)` gives of the whole (B, T, H, W, C), computed `size` frames at a time.

    The first chunk takes the 1 + (T - 1) % size frames that are left over, the others are one `lax.scan`; with a carry
    it takes T % size, or there is none. Between chunks only the carry is kept, in the gradient too: there every chunk
    is computed a second time. Compiled as one program, once a shape; random state of the module, such as dropout's,
    moves on with every chunk.
    """
    structure, parameters, state = nnx.split(module, nnx.Param, ...)
    result, state, carry = _run(structure, step, size, parameters, state, x, carry)
    nnx.update(module, state)
    return result, carry


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(structure, step, size, parameters, state, x, carry):
    def advance(before, chunk):
        state, carry = before
        module = nnx.merge(structure, parameters, state)
        result, carry = step(module, chunk, carry)
        return (nnx.state(module, nnx.Not(nnx.Param)), carry), result

    later = (x.shape[1] - (carry is None)) // size  # at the start of a stream the first chunk is not like the others
    first, rest = jnp.split(x, [x.shape[1] - later * size], axis=1)
    after, results = (state, carry), []
    if first.shape[1] or not later:
        after, result = jax.checkpoint(advance)(after, first)
        results.append(result)
    if later:
        chunks = jnp.moveaxis(rest.reshape(rest.shape[0], later, size, *rest.shape[2:]), 1, 0)
        # inside a loop nothing can be merged with the first computation, so nothing needs to be kept apart from it
        after, result = jax.lax.scan(jax.checkpoint(advance, prevent_cse=False), after, chunks)
        results.append(jax.tree.map(_in_time, result))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results), *after


def _in_time(chunks):
    """Makes (chunks, B, T, ...) one clip (B, chunks * T, ...)."""
    chunks = jnp.moveaxis(chunks, 0, 1)
    return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def checked_chunk(size: int, factor: int) -> int:
    """Gives the size of a chunk; ValueError unless whole latents come of so many frames."""
    if size < 1 or size % factor:
        raise ValueError(f"chunk={size}: expected a multiple of {factor}, at least {factor}")
    return size


def fit_frames(x: ArrayLike, frames: int) -> Array:
    """Cuts (B, T, ...) to its first `frames` frames, or repeats its last one until there are so many."""
    x = jnp.asarray(x)[:, :frames]
    missing = frames - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode="edge") if missing else x
