"""The causal video VAEs in plain PyTorch: the reference that the Flax models are measured against.

Axes are B C T H W (B batch, C channels, T frames, H W pixels). A module's attribute path is its checkpoint key. Files
lie where those of flax_vae lie.
"""

from torch_ref.families.pyramid import CausalVideoVAE, CausalVideoVAEConfig
from torch_ref.models.latents import LatentScaling
from torch_ref.models.posterior import DiagonalGaussian
from torch_ref.runtime.tile import LossyTiling

__all__ = ["CausalVideoVAE", "CausalVideoVAEConfig", "DiagonalGaussian", "LatentScaling", "LossyTiling"]
