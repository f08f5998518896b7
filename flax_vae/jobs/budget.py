"""How many latents a job computes at a time: as many as fit into its memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_vae.runtime.memory import largest, step_bytes
from flax_vae.runtime.stream import Compiled

# A power of two that divides the latents of a piece. More are no faster, and up to size - 1 latents of padding are
# wasted in the last chunk.
MAX_CHUNK_LATENTS = 4
MAX_BATCH_CLIPS = 16  # on CPU a batch of one is as fast
InputShape = Callable[[int], tuple[int, ...]]  # of a step's input for a chunk of N latents; 0 is the first frame


def chunk_latents(step: Compiled, mesh: Mesh | None, shape: InputShape, latents: int | None, budget: int) -> int:
    """Chooses the latents of a chunk, at least one for each device of the mesh's time axis.

    `latents` is how many the whole clip has, where known. ValueError where not even the smallest chunk fits the budget.
    """
    devices = 1 if mesh is None else mesh.shape["time"]
    limit = max(MAX_CHUNK_LATENTS // devices, 1)
    while latents is not None and limit // 2 * devices >= max(latents - 1, 1):
        limit //= 2
    return devices * largest(lambda n: needed(step, shape, None if latents == 1 else n * devices), budget, limit)


def batch_clips(step: Compiled, shape: InputShape, latents: int | None, clips: int, budget: int) -> int:
    """Chooses how many of `clips` clips of one shape form a batch; `latents` are a chunk's, None for images."""
    return largest(lambda n: needed(step, shape, latents, n), budget, min(MAX_BATCH_CLIPS, clips))


def needed(step: Compiled, shape: InputShape, latents: int | None, clips: int = 1) -> int:
    """Returns the bytes of a stream of a batch of clips in chunks of N latents; None is the first frame alone."""
    sizes = (0,) if latents is None else (0, latents)
    return step_bytes(step, *(jax.ShapeDtypeStruct((clips, *shape(size)[1:]), jnp.float32) for size in sizes))
