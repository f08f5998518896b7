"""The residual block. Shapes: B batch, C channels, T frames, H W pixels."""

import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.layers.conv import CausalConv3d
from torch_ref.layers.norm import CausalGroupNorm


class CausalResnetBlock(nn.Module):
    """Two times norm, silu and causal convolution, added to the input: B C T H W -> B C' T H W.

    The sum is divided by `output_scale_factor`. Where the channel count changes, the input goes through a 1x1x1
    convolution, `conv_shortcut`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        num_groups: int = 32,
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = CausalGroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = CausalGroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.output_scale_factor = output_scale_factor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (shortcut + hidden) / self.output_scale_factor
