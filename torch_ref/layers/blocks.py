"""The blocks encoder and decoder are stacked from. Shapes: B batch, C channels, T frames, H W pixels."""

from itertools import pairwise

from torch import Tensor, nn

from torch_ref.layers.attention import Attention
from torch_ref.layers.resample import SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample
from torch_ref.layers.resnet import CausalResnetBlock


class DownBlock(nn.Module):
    """Residual blocks, then the spatial and the temporal halving asked for: B C T H W -> B C' T' H' W'."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        spatial_downsample: bool = True,
        temporal_downsample: bool = False,
    ):
        super().__init__()
        self.resnets = resnet_stack(in_channels, out_channels, num_layers, num_groups, dropout, output_scale_factor)
        self.downsamplers = nn.ModuleList([SpatialDownsample(out_channels)] if spatial_downsample else [])
        self.temporal_downsamplers = nn.ModuleList([TemporalDownsample(out_channels)] if temporal_downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers, *self.temporal_downsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention within each frame, residual block: B C T H W, same shape."""

    def __init__(self, channels: int, num_groups: int = 32, dropout: float = 0.0, output_scale_factor: float = 1.0):
        super().__init__()
        self.resnets = resnet_stack(channels, channels, 2, num_groups, dropout, output_scale_factor)
        self.attentions = nn.ModuleList([Attention(channels, num_groups)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.resnets[0], self.attentions[0], self.resnets[1]]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then the spatial and the temporal doubling asked for: B C T H W -> B C' T' H' W'."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
        spatial_upsample: bool = True,
        temporal_upsample: bool = False,
    ):
        super().__init__()
        self.resnets = resnet_stack(in_channels, out_channels, num_layers, num_groups, dropout, output_scale_factor)
        self.upsamplers = nn.ModuleList([SpatialUpsample(out_channels)] if spatial_upsample else [])
        self.temporal_upsamplers = nn.ModuleList([TemporalUpsample(out_channels)] if temporal_upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers, *self.temporal_upsamplers]:
            x = layer(x)
        return x


def resnet_stack(
    in_channels: int, out_channels: int, num_layers: int, num_groups: int, dropout: float, output_scale_factor: float
) -> nn.ModuleList:
    """`num_layers` residual blocks, the first of which changes the channel count."""
    widths = [in_channels] + [out_channels] * num_layers
    return nn.ModuleList(
        CausalResnetBlock(width, next_width, num_groups, dropout, output_scale_factor)
        for width, next_width in pairwise(widths)
    )
