"""What compares reconstructions with their input, and in which chunks: B batch, T frames, H W pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_vae.jobs.budget import needed
from flax_vae.jobs.clip import Clip
from flax_vae.jobs.model import Model
from flax_vae.jobs.reconstruct import reconstruct_chunk
from flax_vae.jobs.screen import note
from flax_vae.metrics.fvd import FRAMES, I3D, SIZE
from flax_vae.metrics.lpips import LPIPS
from flax_vae.metrics.ssim import ssim
from flax_vae.runtime.memory import largest, process_bytes, program_bytes
from flax_vae.runtime.stream import Compiled, compiled

CHUNK_LATENTS = 2  # with one alone, chunks would have no inner borders of latents to compare their outer ones with
LPIPS_FRAMES = 4  # at a time


class Comparison(nnx.Module):
    """A VAE and, in one program with it, what compares its reconstruction with the input."""

    def __init__(self, vae: Any, lpips: LPIPS | None):
        self.vae, self.lpips = vae, lpips

    def compare_chunk(self, x: Any, carry: Any = None) -> tuple[tuple[Array, dict[str, Array]], Any]:
        """Returns the reconstruction of (B, T, H, W, 3), and the SSIM and LPIPS of each frame as 8 bits hold it."""
        video, carry = reconstruct_chunk(self.vae, x, carry)
        rounded = jnp.rint((jnp.clip(video.astype(x.dtype), -1, 1) + 1) * 127.5) / 127.5 - 1
        scores = {"ssim": ssim(rounded, x)}
        if self.lpips is not None:
            scores["lpips"] = self.lpips(rounded, x, chunk=LPIPS_FRAMES)
        return (video, scores), carry


def window_features(i3d: I3D, x: Any, carry: None = None) -> tuple[Array, None]:
    """Returns what rFVD compares, the features of (1, 16, 224, 224, 3): a step of which each window is a stream."""
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs compute float32 in less by default
        return i3d(x), carry


@dataclass(frozen=True)
class Instruments:
    """The steps of a `Comparison` and, for rFVD, of `window_features`; and the latents of a chunk."""

    compare: Compiled
    features: Compiled | None
    latents: int


def prepare(model: Model, clips: Sequence[Clip], has_lpips: bool, has_fvd: bool, budget: int) -> Instruments:
    """Loads what measures, and chooses the latents of a chunk by the bytes of the budget that are left beside it."""
    comparison = Comparison(model.vae, LPIPS.from_pretrained() if has_lpips else None)
    compare = compiled(comparison.compare_chunk, model.mesh)
    features = compiled(MethodType(window_features, I3D.from_pretrained())) if has_fvd else None
    if features is not None:
        window = jax.ShapeDtypeStruct((1, FRAMES, SIZE, SIZE, 3), jnp.float32)
        taken = process_bytes(program_bytes(features.trace(window, None))) - process_bytes(0)
        budget = max(budget - taken, 0)
    return Instruments(compare, features, chunk_latents(compare, clips, budget))


def chunk_latents(step: Compiled, clips: Sequence[Clip], budget: int) -> int:
    """Chooses the latents of a chunk, the same for all clips; ValueError where not even one fits."""

    def widest(are_images: bool) -> Clip | None:
        return max((c for c in clips if c.is_image == are_images), key=lambda c: c.height * c.width, default=None)

    if image := widest(True):
        largest(lambda _: needed(step, image.shape, None), budget, 1)
    if not (video := widest(False)):
        return 1
    latents = largest(lambda n: needed(step, video.shape, n), budget, CHUNK_LATENTS)
    if latents < CHUNK_LATENTS:
        note(f"memory has room for {latents} latent at a time, and a seam score needs {CHUNK_LATENTS}: it is left out")
    return latents
