"""Video to moments. Shapes: B batch, C channels, T frames, H W pixels; t h w the same of latents."""

import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.layers.blocks import DownBlock, MidBlock
from torch_ref.layers.conv import CausalConv3d
from torch_ref.layers.norm import CausalGroupNorm
from torch_ref.models.config import VAEConfig


class Encoder(nn.Module):
    """Video in [-1, 1], B C T H W, to moments, B 2z t h w: z channels of mean, then z of log variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.encoder_block_out_channels
        groups = config.encoder_norm_num_groups
        self.conv_in = CausalConv3d(config.encoder_in_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                in_channels=widths[max(i - 1, 0)],
                out_channels=widths[i],
                num_layers=config.encoder_layers_per_block[i],
                num_groups=groups,
                dropout=config.encoder_block_dropout[i],
                spatial_downsample=config.encoder_spatial_down_sample[i],
                temporal_downsample=config.encoder_temporal_down_sample[i],
            )
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.encoder_block_dropout[-1])
        self.conv_norm_out = CausalGroupNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.encoder_out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
