"""The memory of a gradient, plain, with remat, and in chunks, as the compiler tells it; nothing is run.

`python -m benchmarks.gradient --config small --frames 17 --size 64` prints a table.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.subjects import Preset, config, machine, memory_of
from flax_vae.families import registry
from flax_vae.layers.sequence import Execution
from flax_vae.runtime.compiler_options import order_for_memory
from flax_vae.runtime.memory import tree_bytes

NOTES = """
- scratch: the temporaries of the program, from XLA's memory_analysis(), beside weights and gradients ({weights} MiB).
- ratio: to that of the plain gradient, of a clip as a whole.
- The gradient is that of the mean squared error through encoder and decoder, by every weight.
"""


def scratch_bytes(preset: Preset, frames: int, size: int, chunk: int | None, remat: bool) -> int:
    """Compiles the gradient, and returns the bytes of its temporaries."""
    vae = registry.abstract(config(preset))
    vae.execution = Execution(remat=remat)
    vae.eval()
    factor = vae.config.temporal_factor
    structure, parameters, rest = nnx.split(vae, nnx.Param, ...)

    def loss(parameters, rest, video):
        vae = nnx.merge(structure, parameters, rest)
        latents = vae.encode(video, chunk).mode()
        return jnp.square(vae.decode(latents, chunk and chunk // factor) - video).mean()

    video = jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.float32)
    program = jax.jit(jax.grad(loss)).lower(parameters, rest, video).compile()
    return memory_of(program).temp_size_in_bytes


def main(config: Preset = "tiny", frames: int = 17, size: int = 64, chunks: tuple[int, ...] = (8, 16)) -> None:
    """Print the memory of a gradient, plain, with remat, and in chunks.

    Args:
        config: preset of the model: tiny, small or full.
        frames: of the clip, 8k + 1.
        size: height and width in pixels.
        chunks: frames at a time, multiples of 8.
    """
    order_for_memory()  # as the commands do
    print(f"# Memory of a gradient, {config} model, {frames} frames of {size}x{size}, in MiB\n\n{machine()}\n")
    print("| | scratch | ratio |\n|---|---:|---:|", flush=True)
    ways = {"plain": (None, False), "remat": (None, True)}
    ways |= {f"chunks of {chunk} frames": (chunk, False) for chunk in chunks if chunk < frames}
    ways |= {f"chunks of {chunk} frames, remat": (chunk, True) for chunk in chunks if chunk < frames}
    plain = 0
    for name, way in ways.items():
        scratch = scratch_bytes(config, frames, size, *way)
        plain = plain or scratch
        print(f"| {name} | {scratch / 2**20:,.0f} | {scratch / plain:.2f} |", flush=True)
    print(NOTES.format(weights=f"{2 * weights_bytes(config) / 2**20:,.0f}"))


def weights_bytes(preset: Preset) -> int:
    """Counts the bytes of a model's weights."""
    return tree_bytes(nnx.state(registry.abstract(config(preset)), nnx.Param))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
