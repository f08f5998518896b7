"""Latents to video. Shapes: B batch, C channels, T frames, H W pixels; t h w the same of latents."""

import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.layers.blocks import MidBlock, UpBlock
from torch_ref.layers.conv import CausalConv3d
from torch_ref.layers.norm import CausalGroupNorm
from torch_ref.models.config import VAEConfig


class Decoder(nn.Module):
    """Latents, B z t h w, to video around [-1, 1], B C T H W; the output is not clamped."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.decoder_block_out_channels[::-1]
        groups = config.decoder_norm_num_groups
        self.conv_in = CausalConv3d(config.decoder_in_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], groups, config.decoder_block_dropout[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(
                in_channels=widths[max(i - 1, 0)],
                out_channels=widths[i],
                num_layers=config.decoder_layers_per_block[i],
                num_groups=groups,
                dropout=config.decoder_block_dropout[i],
                spatial_upsample=config.decoder_spatial_up_sample[i],
                temporal_upsample=config.decoder_temporal_up_sample[i],
            )
            for i in range(len(widths))
        )
        self.conv_norm_out = CausalGroupNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.decoder_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
