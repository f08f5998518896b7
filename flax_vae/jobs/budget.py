"""How many latents a job computes at a time: what fits into the memory it may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_vae.runtime.stream import Compiled

# A power of two that divides the latents of a piece. More are no faster, and up to size - 1 latents of padding are
# wasted in the last chunk.
MAX_CHUNK_LATENTS = 4
MAX_BATCH_CLIPS = 16  # on a CPU one alone is as fast
Shape = tuple[int, ...]


def chunk_latents(step: Compiled, shape: Callable[[int], Shape], latents: int | None, budget: int | None) -> int:
    """Chooses how many latents a chunk has; ValueError where not even one fits.

    `shape` gives the step's input for a chunk of so many latents, 0 standing for the first frame; `latents` is how many
    there will be in all, if known. Where devices divide time, each has at least one.
    """
    least = 1 if step.mesh is None else step.mesh.shape["time"]
    most = max(MAX_CHUNK_LATENTS // least, 1)
    while latents is not None and most // 2 * least >= max(latents - 1, 1):
        most //= 2
    return least * fitting(lambda n: needed(step, shape, n * least if latents != 1 else None, 1), most, budget)


def batch_clips(
    step: Compiled, shape: Callable[[int], Shape], latents: int | None, clips: int, budget: int | None
) -> int:
    """Chooses how many clips of one shape, of `clips` that are left at most, are computed together.

    `latents` is that of a chunk, None where there is none but the first frame.
    """
    return fitting(lambda n: needed(step, shape, latents, n), min(MAX_BATCH_CLIPS, clips), budget)


def fitting(bytes_of: Callable[[int], int], most: int, budget: int | None) -> int:
    """Gives the largest number within the budget."""
    from flax_vae.runtime.memory import available_bytes, largest

    return largest(bytes_of, available_bytes() if budget is None else budget, most)


def needed(step: Compiled, shape: Callable[[int], Shape], latents: int | None, clips: int) -> int:
    """Tells how many bytes so many clips in chunks of so many latents need."""
    import jax
    import jax.numpy as jnp

    from flax_vae.runtime.memory import step_bytes

    first, *later = [
        jax.ShapeDtypeStruct((clips, *shape(size)[1:]), jnp.float32) for size in (0, latents) if size is not None
    ]
    return step_bytes(step, first, *later)
