"""Peak memory by chunk, of encoding and of decoding, beside torch_ref on the clip as a whole, on the CPU.

`python -m benchmarks.memory --config small --size 256` prints two tables. Every row is a process of its own with random
weights. What would not fit into the memory that is free is not run but told, and says so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

from benchmarks.subjects import Job, Preset, machine

COLUMNS = ["", "frames at a time", "arrays (compiler)", "process, told ahead", "process, peak", "peak above the model"]
NOTES = """
- arrays: arguments (weights too), results and temporaries of the program, from XLA's memory_analysis(); nothing is run.
- told ahead: what runtime.plan says before running: the arrays and all else that the process will take.
- peak: the largest resident memory of the process, Python, imports and compilation included; above the model: without
  what was resident before, with the weights loaded.
- Streams are of any length: their peak does not grow with it. The clip as a whole has {frames} frames.
"""


def row_of(kind: str, job: Job, preset: Preset, latents: int, size: int) -> dict[str, int]:
    """Measures one row in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peak", kind, job, preset, *map(str, (latents, size, size))]
    env, root = {**os.environ, "JAX_PLATFORMS": "cpu"}, Path(__file__).parent.parent
    run = subprocess.run(command, env=env, cwd=root, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command[1:])} ended with {run.returncode}; see its error above")
    return json.loads(run.stdout.splitlines()[-1])


def torch_row(job: Job, preset: Preset, latents: int, size: int) -> dict[str, int]:
    """Measures torch_ref at growing sizes up to this one, or tells it from the last one that fits.

    The weights apart, memory grows with the pixels; only what attention takes grows faster, and is small below 512.
    """
    sizes = [size]
    while sizes[0] >= 128:
        sizes.insert(0, sizes[0] // 16 * 8)
    for small, large in zip(sizes, [*sizes[1:], None], strict=True):
        row = row_of("torch", job, preset, latents, small)
        if large is None:
            return row
        growth = row["above"] * large * large // (small * small)
        if row["peak"] + growth > row["free"]:
            loaded, factor = row["peak"] - row["above"], size * size / (small * small)
            return {"told": int(loaded + factor * row["above"]), "from": small}
    raise AssertionError("there is always a last size")


def cells(name: str, frames: str, row: dict[str, int]) -> list[str]:
    """Writes a row of the table, in MiB."""

    def mib(key: str) -> str:
        return f"{row[key] / 2**20:,.0f}" if key in row else "-"

    told = mib("told") + (f" (from {row['from']}x{row['from']})" if "from" in row else "")
    peak = mib("peak") if "peak" in row else "not run: too little memory"
    return [name, frames, mib("arrays"), told, peak, mib("above")]


def main(config: Preset = "tiny", size: int = 256, frames: int = 17, chunks: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Print the peak memory of encoding and decoding by chunk, beside the clip as a whole and torch_ref.

    Args:
        config: preset of the model: tiny, small or full.
        size: height and width in pixels.
        frames: of the clip as a whole, 8k + 1.
        chunks: latents at a time, of streams.
    """
    if frames < 1 or frames % 8 != 1 or size < 16 or min(chunks) < 1:
        raise SystemExit(f"frames={frames}, size={size}, chunks={chunks}: expected 8k + 1, at least 16, and at least 1")
    latents = frames // 8 + 1
    print(f"# Peak memory, {config} model, {size}x{size} pixels, in MiB\n\n{machine()}", flush=True)
    for job in get_args(Job):
        print(f"\n## {job}\n\n| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}", flush=True)

        def show(*row) -> None:
            print(f"| {' | '.join(cells(*row))} |", flush=True)

        for n in chunks:
            name = f"flax_vae, chunks of {n} latent{'s' * (n > 1)}"
            show(name, str(8 * n), row_of("stream", job, config, n, size))
        show("flax_vae, whole", str(frames), row_of("whole", job, config, latents, size))
        show("torch_ref, whole", str(frames), torch_row(job, config, latents, size))
    print(NOTES.format(frames=frames))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
