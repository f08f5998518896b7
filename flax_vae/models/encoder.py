"""From pixels to the moments of the posterior."""

from flax import nnx

from flax_vae.layers.blocks import DownBlock, MidBlock, Output, thread_in_strips
from flax_vae.layers.conv import CausalConv3d, Clip
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.models.config import VAEConfig


class Encoder(nnx.Module):
    """Maps a clip (B, T, H, W, 3), pixels in [-1, 1], to moments (B, t, h, w, 2z), before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.remat, self.frame_by_frame = config.remat, config.frame_by_frame
        self.spatial_factor = config.spatial_factor
        widths, groups = config.encoder_block_out_channels, config.encoder_norm_num_groups
        dropout = config.encoder_block_dropout
        self.conv_in = CausalConv3d(config.encoder_in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                widths[max(i - 1, 0)],
                widths[i],
                config.encoder_layers_per_block[i],
                groups,
                dropout[i],
                spatial_downsample=config.encoder_spatial_down_sample[i],
                temporal_downsample=config.encoder_temporal_down_sample[i],
                rngs=rngs,
            )
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1], groups, dropout[-1], rngs=rngs)
        self.conv_norm_out = CausalGroupNorm(groups, widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: Clip, carry=None):
        """Encodes a clip or a chunk of one; returns the moments and the carry."""
        layers = [self.conv_in, *self.down_blocks, self.mid_block, Output(self.conv_norm_out, self.conv_out)]
        return thread_in_strips(layers, x, carry, self.remat, self.frame_by_frame, self.spatial_factor)
