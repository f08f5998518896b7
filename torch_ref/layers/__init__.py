"""What the causal video VAE is made of; every layer maps a whole clip to a whole clip."""

from torch_ref.layers.attention import Attention
from torch_ref.layers.blocks import DownBlock, MidBlock, UpBlock
from torch_ref.layers.conv import CausalConv3d, Conv3d
from torch_ref.layers.geometry import causal_padding, conv_output_size
from torch_ref.layers.norm import CausalGroupNorm
from torch_ref.layers.resample import (
    AvgPool3d,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
)
from torch_ref.layers.resnet import CausalResnetBlock

__all__ = [
    "Attention",
    "AvgPool3d",
    "CausalConv3d",
    "CausalGroupNorm",
    "CausalResnetBlock",
    "Conv3d",
    "DownBlock",
    "MidBlock",
    "SpatialDownsample",
    "SpatialUpsample",
    "TemporalDownsample",
    "TemporalUpsample",
    "UpBlock",
    "causal_padding",
    "conv_output_size",
]
