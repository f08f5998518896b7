"""The speed of decoding in chunks, against decoding the clip as a whole and against torch_ref, on the CPU.

`python -m benchmarks.chunks --config tiny --sizes 32 64 96` prints a table for each size. All ways decode the same
latents with the same weights; they take turns, so that a machine that slows down slows down all of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
from flax import nnx

from benchmarks.subjects import Preset, chunk_shape, flax_model, machine, random_values, to_torch, torch_model
from flax_vae.io import port
from flax_vae.runtime import stream

Way = Callable[[], list[np.ndarray]]  # gives the video (1, T, H, W, 3) in pieces
WHOLE = "flax_vae, whole"
NOTES = """
- ratio: the median over the rounds of a way's time to that of the whole in the same round; below 1 is faster.
- chunks, one program: vae.decode(latents, chunk=n) under jit. Stream: runtime.stream.decode, results copied to numpy.
- Compilation is not counted: every way runs once before it is timed.
"""


def ways_to_decode(preset: Preset, latents: np.ndarray, chunks: tuple[int, ...]) -> dict[str, Way]:
    """Returns functions that decode the latents (1, t, h, w, z) all of them with the same weights."""
    vae = flax_model(preset)
    structure, state = nnx.split(vae)

    def in_one_program(chunk: int | None) -> Way:
        run = jax.jit(lambda state, z: nnx.merge(structure, state).decode(z, chunk))
        return lambda: [np.asarray(run(state, latents))]

    def streamed(chunk: int) -> Way:
        first = 1 + (latents.shape[1] - 1) % chunk
        pieces = [piece[None] for piece in stream.cut(latents[0], chunk, first)]
        return lambda: [np.asarray(video) for video in stream.decode(vae, pieces)]

    ways = {WHOLE: in_one_program(None)}
    for chunk in chunks:
        ways[f"flax_vae, chunks of {chunk}, one program"] = in_one_program(chunk)
        ways[f"flax_vae, chunks of {chunk}, stream"] = streamed(chunk)
    for name, layout in {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}.items():
        ways[f"torch_ref, whole, {name}"] = in_torch(preset, vae, latents, layout)
    return ways


def in_torch(preset: Preset, vae: Any, latents: np.ndarray, layout: torch.memory_format) -> Way:
    """Returns a function that decodes with torch_ref, eagerly, in a memory layout."""
    model, z = torch_model(preset), to_torch(latents).contiguous(memory_format=layout)
    weights = {key: torch.from_numpy(value) for key, value in port.torch_layout(vae).items()}
    kernels = {key: w.contiguous(memory_format=layout) for key, w in weights.items() if w.ndim == 5}
    model.load_state_dict(weights | kernels, assign=True)

    def run() -> list[np.ndarray]:
        with torch.no_grad():
            return [model.decode(z).movedim(1, -1).numpy()]

    return run


def in_turns(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Times every way once a round, in seconds; the order is turned around from round to round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    expected = np.concatenate(ways[WHOLE](), axis=1)
    for name, run in ways.items():
        if not np.allclose(np.concatenate(run(), axis=1), expected, rtol=0, atol=1e-3 * np.abs(expected).max()):
            raise SystemExit(f"{name} decodes to something else than {WHOLE}: the comparison would be void")
    for i in range(rounds):
        for name in list(ways)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return times


def main(
    config: Preset = "tiny",
    sizes: tuple[int, ...] = (32, 64, 96),
    latents: int = 5,
    chunks: tuple[int, ...] = (1, 2, 4),
    rounds: int = 5,
) -> None:
    """Print how long decoding takes in chunks, as a whole and in torch_ref, and the ratios.

    Args:
        config: preset of the model: tiny, small or full.
        sizes: heights and widths in pixels.
        latents: of the clip; 5 are 33 frames.
        chunks: latents at a time.
        rounds: how often every way is timed.
    """
    if min(latents, rounds, *chunks) < 1 or max(chunks) >= latents or min(sizes) < 8:
        raise SystemExit(f"expected rounds, chunks of 1 to {latents - 1} latents, and sizes of 8 and more")
    frames = 8 * latents - 7
    print(f"# Decoding in chunks, {config} model, {frames} frames\n\n{machine()}; {rounds} rounds", flush=True)
    for size in sizes:
        z = random_values(np.random.default_rng(0), chunk_shape("decode", latents, size, size))
        times = in_turns(ways_to_decode(config, z, chunks), rounds)
        print(f"\n## {size}x{size} pixels\n\n| | seconds, median | frames/s | ratio to whole | least | most |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times[WHOLE], strict=True)]
            seconds, ratio = statistics.median(taken), statistics.median(ratios)
            numbers = f"{seconds:.3f} | {frames / seconds:.1f} | {ratio:.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
            print(f"| {name} | {numbers} |", flush=True)
    print(NOTES)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
