"""How many latents a command computes at a time: what fits into the memory it may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_vae.runtime.stream import Compiled

# Latents of a chunk: a power of two that divides those of a piece. More are no faster, and as many but one may be
# computed for nothing at the end.
MOST = 4
MOST_CLIPS = 16  # of a batch; on a CPU one alone is as fast
Shape = tuple[int, ...]


def read_budget(memory: str | None) -> int | None:
    """Reads "4GiB" as bytes; None stands for the device's own."""
    from flax_vae.runtime.memory import parse_bytes

    return None if memory is None else parse_bytes(memory)


def chunk_latents(step: Compiled, shape: Callable[[int], Shape], latents: int | None, budget: int | None) -> int:
    """Chooses how many latents a chunk has; ValueError where not even one fits.

    `shape` gives the step's input for a chunk of so many latents, 0 standing for the first frame; `latents` is how many
    there will be in all, if known. Where devices divide time, each has at least one.
    """
    least = 1 if step.mesh is None else step.mesh.shape["time"]
    most = max(MOST // least, 1)
    while latents is not None and most // 2 * least >= max(latents - 1, 1):
        most //= 2
    return least * fitting(lambda n: needed(step, shape, n * least if latents != 1 else None, 1), most, budget)


def batch_clips(
    step: Compiled, shape: Callable[[int], Shape], latents: int | None, clips: int, budget: int | None
) -> int:
    """Chooses how many clips of one shape, of `clips` that are left at most, are computed together.

    `latents` is that of a chunk, None where there is none but the first frame.
    """
    return fitting(lambda n: needed(step, shape, latents, n), min(MOST_CLIPS, clips), budget)


def fitting(bytes_of: Callable[[int], int], most: int, budget: int | None) -> int:
    """Gives the largest number within the budget."""
    from flax_vae.runtime import memory as plan

    return plan.largest(bytes_of, plan.available_bytes() if budget is None else budget, most)


def needed(step: Compiled, shape: Callable[[int], Shape], latents: int | None, clips: int) -> int:
    """Tells how many bytes so many clips in chunks of so many latents need."""
    import jax
    import jax.numpy as jnp

    from flax_vae.runtime.memory import step_bytes

    first, *later = [
        jax.ShapeDtypeStruct((clips, *shape(size)[1:]), jnp.float32) for size in (0, latents) if size is not None
    ]
    return step_bytes(step, first, *later)
