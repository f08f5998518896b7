"""What is measured, and where: models with random weights, their inputs, and the machine.

B batch, T frames, H W pixels, C channels; flax_vae takes B T H W C, torch_ref B C T H W. Each framework is imported
where it is used, so that a process that measures the one does not hold the other.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

if TYPE_CHECKING:
    import jax
    import torch

    import torch_ref
    from flax_vae.models.config import VAEConfig
    from flax_vae.models.vae import VideoVAE

Preset = Literal["full", "small", "tiny"]
PRESETS: dict[Preset, str] = {"full": "pyramid-flow", "small": "pyramid-flow-small", "tiny": "pyramid-flow-tiny"}
Job = Literal["encode", "decode"]


def config(preset: Preset) -> VAEConfig:
    """Returns the config of a preset."""
    from flax_vae.families import registry

    return registry.preset(PRESETS[preset])


def flax_model(preset: Preset) -> VideoVAE:
    """Builds flax_vae's model with random weights; with zeros, pages of memory would be missing."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flax_vae.families import registry

    rng = np.random.default_rng(0)
    vae = registry.abstract(config(preset))
    weights = jax.tree.map(lambda leaf: jnp.asarray(random_values(rng, leaf.shape) * 0.05), nnx.state(vae))
    nnx.update(vae, weights)
    vae.eval()
    return vae


def torch_model(preset: Preset) -> torch_ref.CausalVideoVAE:
    """Builds torch_ref's model with random weights."""
    import torch_ref

    # The config is read in a process of its own, as jax would count to the memory of this one.
    command, root = [sys.executable, "-m", "benchmarks.subjects", preset], Path(__file__).parent.parent
    values = json.loads(subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE).stdout)
    return torch_ref.CausalVideoVAE.from_config(values).eval()


def chunk_shape(job: Job, latents: int, height: int, width: int, is_first: bool = True) -> tuple[int, ...]:
    """Returns the shape (1, T, H, W, C) of the frames that become N latents, or of the latents themselves."""
    if job == "encode":
        return 1, 8 * latents - 7 * is_first, height, width, 3
    return 1, latents, -(-height // 8), -(-width // 8), 16


def random_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws float32 values in [-1, 1]."""
    return rng.random(shape, np.float32) * 2 - 1


def to_torch(clip: np.ndarray) -> torch.Tensor:
    """Copies B T H W C to torch's B C T H W."""
    import torch

    return torch.from_numpy(np.moveaxis(clip, -1, 1).copy())


def memory_of(compiled: jax.stages.Compiled) -> Any:
    """Returns XLA's account of a program's memory; RuntimeError where there is none."""
    if (memory := compiled.memory_analysis()) is None:
        raise RuntimeError("the compiler does not tell what a program takes")
    return memory


def machine() -> str:
    """Names the processor, its memory, and the versions and threads of both frameworks."""
    import jax
    import torch

    from flax_vae.runtime.memory import format_bytes, physical_bytes

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor}, {os.cpu_count()} cores, {format_bytes(physical_bytes())}{load}; float32; "
        f"jax {jax.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    print(json.dumps(config(cast(Preset, sys.argv[1])).to_dict()))
