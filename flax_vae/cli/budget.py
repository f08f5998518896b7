"""How many latents a command computes at a time: what fits into the memory it may use."""

from __future__ import annotations

from collections.abc import Callable

from flax_vae.cli.run import PIECE

MOST = 4  # latents of a chunk; more are no faster, and up to one less than that many are computed for nothing
MOST_CLIPS = 16  # of a batch; on a CPU one alone is as fast
Shape = tuple[int, ...]


def read_budget(memory: str | None) -> int | None:
    """Reads "4GiB" as bytes; None stands for the device's own."""
    from flax_vae.runtime.plan import parse_bytes

    return None if memory is None else parse_bytes(memory)


def chunk_latents(step: Callable, shape: Callable[[int], Shape], latents: int | None, budget: int | None) -> int:
    """Chooses how many latents a chunk has, and says so; ValueError where not even one fits.

    `shape` gives the step's input for a chunk of so many latents, 0 standing for the first frame; `latents` is how many
    there will be in all, if known.
    """
    import jax
    import jax.numpy as jnp

    from flax_vae.runtime import plan

    def chunk(latents: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape(latents), jnp.float32)

    most = MOST
    while latents is not None and most // 2 >= max(latents - 1, 1):
        most //= 2
    budget = plan.available_bytes() if budget is None else budget
    return plan.largest(lambda n: plan.step_bytes(step, chunk(0), chunk(n)), budget, min(most, PIECE))


def batch_clips(step: Callable, shape: Callable[[int], Shape], latents: int, clips: int, budget: int | None) -> int:
    """Chooses how many clips of one shape, of `clips` that are left at most, are computed together."""
    import jax
    import jax.numpy as jnp

    from flax_vae.runtime import plan

    def chunks(n: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((n, *shape(size)[1:]), jnp.float32) for size in (0, latents)]

    budget = plan.available_bytes() if budget is None else budget
    return plan.largest(lambda n: plan.step_bytes(step, *chunks(n)), budget, min(MOST_CLIPS, clips))
