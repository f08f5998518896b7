"""The peak memory of one piece of work, in a process of its own that `benchmarks.memory` starts; in bytes, as JSON."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subjects import Job, Preset, chunk_shape, flax_model, random_values, to_torch, torch_model
from flax_vae.runtime.compiler_options import order_for_memory

LATER_CHUNKS = 3  # a stream takes no more with more of them


def status(file: str, field: str) -> int:
    """Reads a field, such as VmRSS of /proc/self/status, in bytes."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def free_bytes() -> int:
    """Returns nine tenths of the memory that is available without swapping."""
    from flax_vae.runtime.memory import cgroup_limits

    return min([status("/proc/meminfo", "MemAvailable"), *cgroup_limits()]) * 9 // 10


def loaded_bytes() -> int:
    """Resets the peak and returns the resident bytes; to be called once the model is loaded."""
    gc.collect()
    with contextlib.suppress(OSError):  # where the peak cannot be reset, that of loading counts too
        Path("/proc/self/clear_refs").write_text("5")
    return status("/proc/self/status", "VmRSS")


def peak_above(loaded: int) -> dict[str, int]:
    """Returns the peak of the process, and how much of it came on top of what had been loaded."""
    peak = status("/proc/self/status", "VmHWM")
    return {"peak": peak, "above": peak - loaded}


def stream_row(job: Job, preset: Preset, latents: int, height: int, width: int) -> dict[str, int]:
    """Measures a stream: the bytes that its step tells, and the peak of a run where that much is free."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flax_vae.runtime import memory as plan
    from flax_vae.runtime.stream import Stream, compiled

    vae = flax_model(preset)
    loaded = loaded_bytes()
    step, rng = compiled(vae.encode_chunk if job == "encode" else vae.decode_chunk), np.random.default_rng(0)
    chunks = [chunk_shape(job, 1, height, width)]
    chunks += [chunk_shape(job, latents, height, width, is_first=False)] * LATER_CHUNKS
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in chunks[:2]]
    traced = step.trace(shapes[1], step.trace(shapes[0], None).out_info[1])
    row = {"weights": plan.tree_bytes(nnx.state(vae)), "arrays": plan.program_bytes(traced)}
    row["told"] = plan.step_bytes(step, *shapes)
    if row["told"] - row["weights"] > free_bytes():
        return row
    for result in Stream(step, (random_values(rng, shape) for shape in chunks)):
        jax.tree.map(np.asarray, result)
    return row | peak_above(loaded)


def whole_row(job: Job, preset: Preset, latents: int, height: int, width: int) -> dict[str, int]:
    """Measures a whole clip: the bytes that its program tells, and the peak of a run where that much is free."""
    import jax
    from flax import nnx

    from flax_vae.runtime import memory as plan

    vae = flax_model(preset)
    loaded = loaded_bytes()
    structure, state = nnx.split(vae)
    run = jax.jit(lambda state, x: getattr(nnx.merge(structure, state), job)(x))
    clip = random_values(np.random.default_rng(0), chunk_shape(job, latents, height, width))
    program = run.lower(state, clip).compile()
    arrays = plan.compiled_bytes(program)
    row = {"weights": plan.tree_bytes(state), "arrays": arrays, "told": plan.process_bytes(arrays)}
    if row["told"] - row["weights"] > free_bytes():
        return row
    jax.tree.map(np.asarray, program(state, clip))
    return row | peak_above(loaded)


def torch_row(job: Job, preset: Preset, latents: int, height: int, width: int) -> dict[str, int]:
    """Runs torch_ref on a clip as a whole."""
    import torch

    vae = torch_model(preset)
    loaded = loaded_bytes()
    clip = random_values(np.random.default_rng(0), chunk_shape(job, latents, height, width))
    with torch.no_grad():
        (vae.encode if job == "encode" else vae.decode)(to_torch(clip))
    return {"weights": sum(p.nbytes for p in vae.parameters())} | peak_above(loaded)


def main(kind: str, job: Any, preset: Any, *sizes: str) -> None:
    """Prints the row of one kind: torch, stream or whole."""
    order_for_memory()  # as the commands do
    latents, height, width = map(int, sizes)
    row = {"torch": torch_row, "stream": stream_row, "whole": whole_row}[kind](job, preset, latents, height, width)
    print(json.dumps(row | {"free": free_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
