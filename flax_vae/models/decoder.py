"""From latents to pixels."""

from flax import nnx

from flax_vae.layers.blocks import MidBlock, Output, UpBlock, thread_in_strips
from flax_vae.layers.conv import CausalConv3d, Clip
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.models.config import VAEConfig


class Decoder(nnx.Module):
    """Maps latents (B, t, h, w, z), after `post_quant_conv`, to a clip (B, T, H, W, 3), pixels about [-1, 1]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.remat, self.frame_by_frame = config.remat, config.frame_by_frame
        widths, groups = config.decoder_block_out_channels[::-1], config.decoder_norm_num_groups
        dropout = config.decoder_block_dropout
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, dropout[0], rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(
                widths[max(i - 1, 0)],
                widths[i],
                config.decoder_layers_per_block[i],
                groups,
                dropout[i],
                spatial_upsample=config.decoder_spatial_up_sample[i],
                temporal_upsample=config.decoder_temporal_up_sample[i],
                rngs=rngs,
            )
            for i in range(len(widths))
        )
        self.conv_norm_out = CausalGroupNorm(groups, widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], config.decoder_out_channels, 3, rngs=rngs)

    def __call__(self, z: Clip, carry=None):
        """Decodes latents or a chunk of them; returns the frames and the carry."""
        layers = [self.conv_in, self.mid_block, *self.up_blocks, Output(self.conv_norm_out, self.conv_out)]
        return thread_in_strips(layers, z, carry, self.remat, self.frame_by_frame, 1)
