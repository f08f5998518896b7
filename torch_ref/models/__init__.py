"""The causal video VAE: configuration, encoder, decoder, posterior, the model itself, and tiles."""

from torch_ref.models.config import VAEConfig
from torch_ref.models.decoder import Decoder
from torch_ref.models.encoder import Encoder
from torch_ref.models.latents import LatentScaling
from torch_ref.models.posterior import DiagonalGaussian
from torch_ref.models.vae import CausalVideoVAE
from torch_ref.runtime.tile import LossyTiling

__all__ = ["CausalVideoVAE", "Decoder", "DiagonalGaussian", "Encoder", "LatentScaling", "LossyTiling", "VAEConfig"]
