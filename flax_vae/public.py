"""The public names of flax_vae, in one list; `import flax_vae` brings them in when the first one is used."""

from flax_vae.io.pixels import to_float, to_uint8
from flax_vae.layers.attention import Attention
from flax_vae.layers.blocks import DownBlock, MidBlock, UpBlock, thread
from flax_vae.layers.conv import CausalConv3d, Conv3d
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.resample import AvgPool3d, SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample
from flax_vae.layers.resnet import CausalResnetBlock
from flax_vae.models.config import VAEConfig
from flax_vae.models.decoder import Decoder
from flax_vae.models.encoder import Encoder
from flax_vae.models.latents import LatentScaling
from flax_vae.models.posterior import DiagonalGaussian
from flax_vae.models.vae import CausalVideoVAE
from flax_vae.ops.geometry import causal_padding, conv_output_size, latent_frames, lax_padding, pixel_frames
from flax_vae.runtime.tile import LossyTiles, LossyTiling

__all__ = [
    "Attention",
    "AvgPool3d",
    "CausalConv3d",
    "CausalGroupNorm",
    "CausalResnetBlock",
    "CausalVideoVAE",
    "Conv3d",
    "Decoder",
    "DiagonalGaussian",
    "DownBlock",
    "Encoder",
    "LatentScaling",
    "LossyTiles",
    "LossyTiling",
    "MidBlock",
    "SpatialDownsample",
    "SpatialUpsample",
    "TemporalDownsample",
    "TemporalUpsample",
    "UpBlock",
    "VAEConfig",
    "causal_padding",
    "conv_output_size",
    "latent_frames",
    "lax_padding",
    "pixel_frames",
    "thread",
    "to_float",
    "to_uint8",
]
