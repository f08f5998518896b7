"""The smallest VAE in which everything happens: two blocks a side, space halved once, time twice."""

from flax_vae import VAEConfig

CONFIG = VAEConfig(
    encoder_out_channels=2,
    encoder_layers_per_block=(1, 1),
    encoder_down_block_types=("DownEncoderBlockCausal3D",) * 2,
    encoder_block_out_channels=(4, 6),
    encoder_spatial_down_sample=(True, False),
    encoder_temporal_down_sample=(True, True),
    encoder_block_dropout=(0.0, 0.0),
    encoder_norm_num_groups=2,
    decoder_in_channels=2,
    decoder_layers_per_block=(1, 1),
    decoder_up_block_types=("UpDecoderBlockCausal3D",) * 2,
    decoder_block_out_channels=(4, 4),
    decoder_spatial_up_sample=(False, True),
    decoder_temporal_up_sample=(True, True),
    decoder_block_dropout=(0.0, 0.0),
    decoder_norm_num_groups=2,
)
