"""The causal video VAE: configuration, encoder, decoder, posterior, the model itself, and tiles."""

from torch_ref.models.config import VAEConfig
from torch_ref.models.decoder import Decoder
from torch_ref.models.encoder import Encoder
from torch_ref.models.posterior import DiagonalGaussian
from torch_ref.models.scaling import LatentScaling
from torch_ref.models.tiling import LossyTiling
from torch_ref.models.vae import CausalVideoVAE

__all__ = ["CausalVideoVAE", "Decoder", "DiagonalGaussian", "Encoder", "LatentScaling", "LossyTiling", "VAEConfig"]
