"""A clip through a stateful step in chunks, as one program: B batch, T frames, H W pixels, C channels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_vae.layers.conv import Clip

Step = Callable[[Any, Clip, Any], tuple[Any, Any]]  # (module or several, chunk, carry) -> (result, carry)


def scan_chunks(module: nnx.Module | tuple, step: Step, x: Clip, size: int, carry: Any = None) -> tuple[Any, Any]:
    """Returns what `step(module, x, carry)` returns for the whole (B, T, H, W, C), computed `size` frames at a time.

    The first chunk takes the 1 + (T - 1) % size frames that are left over, the others are one `lax.scan`; with a carry
    it takes T % size, or there is none. Between chunks only the carry is kept, and a gradient recomputes every chunk.
    Compiled as one program, once a shape; random state of the module, such as dropout's, moves on with every chunk.
    """
    structure, parameters, state = nnx.split(module, nnx.Param, ...)
    result, state, carry = _scan(structure, step, size, parameters, state, x, carry)
    nnx.update(module, state)
    return result, carry


@partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(structure, step, size, parameters, state, x, carry):
    def advance(before, chunk):
        state, carry = before
        module = nnx.merge(structure, parameters, state)
        with jax.named_scope("chunk"):
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
        # XLA does not merge a loop's body with the first computation, so no barrier against CSE is needed
        after, result = jax.lax.scan(jax.checkpoint(advance, prevent_cse=False), after, chunks)
        results.append(jax.tree.map(_joined, result))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results), *after


def _joined(chunks):
    """Joins (chunks, B, T, ...) to one clip (B, chunks * T, ...)."""
    chunks = jnp.moveaxis(chunks, 0, 1)
    return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])
