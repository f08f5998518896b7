"""The smallest VAEs in which everything happens."""

from dataclasses import replace

from flax_vae import CausalVideoVAEConfig


def config(*spatial: bool, widths: tuple[int, ...] = (4, 6)) -> CausalVideoVAEConfig:
    """Gives a config with one block for every argument, which says whether it halves or doubles space; all do so to
    time. `widths` are the channels of the encoder's blocks, the last of them where there are fewer."""
    blocks, every = len(spatial), (True,) * len(spatial)
    return CausalVideoVAEConfig(
        encoder_out_channels=2,
        encoder_layers_per_block=(1,) * blocks,
        encoder_down_block_types=("DownEncoderBlockCausal3D",) * blocks,
        encoder_block_out_channels=widths[-blocks:],
        encoder_spatial_down_sample=spatial,
        encoder_temporal_down_sample=every,
        encoder_block_dropout=(0.0,) * blocks,
        encoder_norm_num_groups=2,
        decoder_in_channels=2,
        decoder_layers_per_block=(1,) * blocks,
        decoder_up_block_types=("UpDecoderBlockCausal3D",) * blocks,
        decoder_block_out_channels=(4,) * blocks,
        decoder_spatial_up_sample=spatial[::-1],
        decoder_temporal_up_sample=every,
        decoder_block_dropout=(0.0,) * blocks,
        decoder_norm_num_groups=2,
    )


CONFIG, ONE_BLOCK = config(True, False), config(True)
# A latent spans as much as one of the released model, and has as many channels.
THREE_BLOCKS = replace(config(True, True, True, widths=(4, 4, 6)), encoder_out_channels=16, decoder_in_channels=16)
