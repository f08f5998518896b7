"""The causal video VAE in plain PyTorch: the reference that the Flax model is measured against.

Axes are B C T H W (B batch, C channels, T frames, H W pixels). A module's attribute path is its checkpoint key.
"""

from torch_ref.layers import (
    Attention,
    AvgPool3d,
    CausalConv3d,
    CausalGroupNorm,
    CausalResnetBlock,
    Conv3d,
    DownBlock,
    MidBlock,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
    UpBlock,
    causal_padding,
    conv_output_size,
)
from torch_ref.models import CausalVideoVAE, Decoder, DiagonalGaussian, Encoder, LatentScaling, LossyTiling, VAEConfig

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
]
