"""Halving and doubling of pixels and of frames. Shapes: B batch, C channels, T frames, H W pixels."""

import torch
from torch import Tensor, nn

from torch_ref.layers.conv import CausalConv3d


class AvgPool3d(nn.AvgPool3d):
    """torch's own AvgPool3d, averaging half precision in float32: on the CPU torch has no kernel for it."""

    def forward(self, input: Tensor) -> Tensor:
        precise = torch.promote_types(input.dtype, torch.float32)
        return super().forward(input.to(precise)).to(input.dtype)


class SpatialDownsample(nn.Module):
    """Halves height and width: B C T H W -> B C' T ceil(H/2) ceil(W/2); pooled (use_conv=False), floor for ceil.

    Raises ValueError where pooling is to change the channel count.
    """

    def __init__(self, channels: int, out_channels: int | None = None, use_conv: bool = True):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if use_conv:
            self.conv = CausalConv3d(channels, out_channels, 3, stride=(1, 2, 2))
        else:
            refuse_channel_change(channels, out_channels)
            self.conv = AvgPool3d((1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TemporalDownsample(nn.Module):
    """Halves the frames, the first one counted by itself: 2k+1 frames -> k+1, B C T H W -> B C' ceil(T/2) H W.

    Pooling (use_conv=False) sees the clip's first frame twice, so that an image stays an image and pairs end on odd
    frames, as with the convolution. Raises ValueError where pooling is to change the channel count.
    """

    def __init__(self, channels: int, out_channels: int | None = None, use_conv: bool = True):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.use_conv = use_conv
        if use_conv:
            self.conv = CausalConv3d(channels, out_channels, 3, stride=(2, 1, 1))
        else:
            refuse_channel_change(channels, out_channels)
            self.conv = AvgPool3d((2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_conv:
            x = torch.cat([x[:, :, :1], x], dim=2)
        return self.conv(x)


class SpatialUpsample(nn.Module):
    """Doubles height and width: B C T H W -> B C' T 2H 2W.

    Channel (c*2 + row)*2 + column goes to pixel (row, column) of each square of four.
    """

    def __init__(self, channels: int, out_channels: int | None = None):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.conv = CausalConv3d(channels, out_channels * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, channels, frames, height, width = x.shape
        x = x.reshape(batch, channels // 4, 2, 2, frames, height, width)  # B C row column T H W
        x = x.permute(0, 1, 4, 5, 2, 6, 3)  # B C T H row W column
        return x.reshape(batch, channels // 4, frames, height * 2, width * 2)


class TemporalUpsample(nn.Module):
    """Doubles the frames but for the first: n frames -> 2n-1, B C T H W -> B C' 2T-1 H W.

    Channel c*2 + p goes to frame p of each pair; the first frame of the clip is dropped.
    """

    def __init__(self, channels: int, out_channels: int | None = None):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.conv = CausalConv3d(channels, out_channels * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, channels, frames, height, width = x.shape
        x = x.reshape(batch, channels // 2, 2, frames, height, width)  # B C pair T H W
        x = x.permute(0, 1, 3, 2, 4, 5)  # B C T pair H W
        x = x.reshape(batch, channels // 2, frames * 2, height, width)
        return x[:, :, 1:]


def refuse_channel_change(channels: int, out_channels: int) -> None:
    if out_channels != channels:
        raise ValueError(
            f"out_channels is {out_channels}, channels is {channels}: use use_conv=True, pooling keeps channels"
        )
