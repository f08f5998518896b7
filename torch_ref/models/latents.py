"""Latents to the range a diffusion model expects. Shapes: B batch, z channels, t h w latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScaling:
    """(z - shift) * scale on B z t h w, the first latent frame (or image) apart from the rest."""

    first_shift: float
    first_scale: float
    rest_shift: float
    rest_scale: float

    def normalize(self, z: Tensor) -> Tensor:
        """Latents as the VAE makes them, to latents as the diffusion model takes them."""
        first, rest = z[:, :, :1], z[:, :, 1:]
        first = (first - self.first_shift) * self.first_scale
        rest = (rest - self.rest_shift) * self.rest_scale
        return torch.cat([first, rest], dim=2)

    def denormalize(self, z: Tensor) -> Tensor:
        """Latents as the diffusion model makes them, to latents as the VAE takes them."""
        first, rest = z[:, :, :1], z[:, :, 1:]
        first = first / self.first_scale + self.first_shift
        rest = rest / self.rest_scale + self.rest_shift
        return torch.cat([first, rest], dim=2)
