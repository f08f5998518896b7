"""What is measured, and where: models with random weights, their inputs, and the machine.

B batch, T frames, H W pixels, C channels; flax_vae takes B T H W C, torch_ref B C T H W. Each framework is imported
where it is used, so that a process that measures the one does not hold the other.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from flax_vae.families.pyramid import CausalVideoVAEConfig

if TYPE_CHECKING:
    import torch

    import torch_ref
    from flax_vae import CausalVideoVAE

Preset = Literal["full", "small", "tiny"]
Job = Literal["encode", "decode"]


def config(preset: Preset) -> CausalVideoVAEConfig:
    """Gives the configuration of this name."""
    return getattr(CausalVideoVAEConfig, preset)()


def flax_model(preset: Preset) -> CausalVideoVAE:
    """Builds flax_vae's model with random weights; with zeros, pages of memory would be missing."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flax_vae import CausalVideoVAE

    rng = np.random.default_rng(0)
    vae = nnx.eval_shape(lambda: CausalVideoVAE(config(preset), rngs=nnx.Rngs(0)))
    weights = jax.tree.map(lambda leaf: jnp.asarray(random_values(rng, leaf.shape) * 0.05), nnx.state(vae))
    nnx.update(vae, weights)
    vae.eval()
    return vae


def torch_model(preset: Preset) -> torch_ref.CausalVideoVAE:
    """Builds torch_ref's model with random weights."""
    import torch_ref

    return torch_ref.CausalVideoVAE.from_config(config(preset).to_dict()).eval()


def chunk_shape(job: Job, latents: int, height: int, width: int, is_first: bool = True) -> tuple[int, ...]:
    """Gives the shape (1, T, H, W, C) of the frames that become so many latents, or of the latents themselves."""
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
