"""What compares reconstructions with their input, and how much of a clip at a time: B batch, T frames, H W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_vae.jobs.budget import fitting, needed
from flax_vae.jobs.clip import Clip
from flax_vae.jobs.model import Model
from flax_vae.jobs.reconstruct import reconstruct_chunk
from flax_vae.jobs.screen import note
from flax_vae.metrics.fvd import FRAMES, I3D, SIZE
from flax_vae.metrics.lpips import LPIPS
from flax_vae.metrics.ssim import ssim
from flax_vae.runtime.memory import available_bytes, process_bytes, program_bytes
from flax_vae.runtime.stream import Compiled, compiled

CHUNK = 2  # latents: with one alone, no border of latents would be left to compare the borders of chunks with
LPIPS_FRAMES = 4  # at a time


class Comparison(nnx.Module):
    """A VAE and, to be one program with it, what compares its reconstruction with the input."""

    def __init__(self, vae: Any, lpips: LPIPS | None):
        self.vae, self.lpips = vae, lpips

    def compare_chunk(self, x: Any, carry: Any = None) -> tuple[tuple[Array, dict[str, Array]], Any]:
        """Gives the reconstruction of (B, T, H, W, 3), and the SSIM and LPIPS of each frame as 8 bits hold it."""
        video, carry = reconstruct_chunk(self.vae, x, carry)
        shown = jnp.rint((jnp.clip(video.astype(x.dtype), -1, 1) + 1) * 127.5) / 127.5 - 1
        scores = {"ssim": ssim(shown, x)}
        if self.lpips is not None:
            scores["lpips"] = self.lpips(shown, x, chunk=LPIPS_FRAMES)
        return (video, scores), carry


class Windows(nnx.Module):
    """Computes what rFVD compares: the features of 16 frames in a row."""

    def __init__(self, i3d: I3D):
        self.i3d = i3d

    def features(self, x: Any, carry: None = None) -> tuple[Array, None]:
        """Gives those of (1, 16, 224, 224, 3), as a step of which each window is a stream."""
        with jax.default_matmul_precision("highest"):  # GPUs and TPUs compute float32 in less by default
            return self.i3d(x), carry


@dataclass(frozen=True)
class Instruments:
    """What measures: the steps of a `Comparison` and, for rFVD, of `Windows`; and how many latents at a time."""

    compare: Compiled
    features: Compiled | None
    latents: int


def prepare(model: Model, clips: Sequence[Clip], has_lpips: bool, has_fvd: bool, budget: int | None) -> Instruments:
    """Loads what measures, and chooses how many latents at a time fit into the memory beside it."""
    budget = available_bytes() if budget is None else budget
    comparison = Comparison(model.vae, LPIPS.from_pretrained() if has_lpips else None)
    compare = compiled(comparison.compare_chunk, model.mesh)
    features = compiled(Windows(I3D.from_pretrained()).features) if has_fvd else None
    if features is not None:
        budget = max(budget - features_bytes(features), 0)
    return Instruments(compare, features, plan(compare, clips, budget))


def features_bytes(features: Compiled) -> int:
    """Tells how many bytes the features of a window take, beside what a process takes anyway."""
    window = jax.ShapeDtypeStruct((1, FRAMES, SIZE, SIZE, 3), jnp.float32)
    return process_bytes(program_bytes(features.trace(window, None))) - process_bytes(0)


def plan(step: Compiled, clips: Sequence[Clip], budget: int) -> int:
    """Chooses how many latents a chunk has, the same for all clips; ValueError where not even one fits."""

    def largest(are_images: bool) -> Clip | None:
        return max((c for c in clips if c.is_image == are_images), key=lambda c: c.height * c.width, default=None)

    if image := largest(True):
        fitting(lambda _: needed(step, image.shape, None, 1), 1, budget)
    if not (video := largest(False)):
        return 1
    latents = fitting(lambda n: needed(step, video.shape, n, 1), CHUNK, budget)
    if latents < CHUNK:
        note(f"memory has room for {latents} latent at a time, and a seam score needs {CHUNK}: it is left out")
    return latents
