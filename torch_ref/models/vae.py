"""The whole model. Shapes: B batch, C channels, T frames, H W pixels; z channels and t h w of latents."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_ref.checkpoint import read_config, read_weights, write_checkpoint
from torch_ref.layers.conv import CausalConv3d
from torch_ref.models.config import VAEConfig
from torch_ref.models.decoder import Decoder
from torch_ref.models.encoder import Encoder
from torch_ref.models.posterior import DiagonalGaussian


class CausalVideoVAE(nn.Module):
    """The causal video VAE of the Pyramid-Flow checkpoints; `state_dict()` has exactly their keys.

    With the released configuration, 8k+1 frames of H x W pixels become k+1 latent frames of ceil(H/8) x ceil(W/8).
    Fresh weights are normal with a standard deviation of 0.02, biases zero, norms one and zero.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        latent_channels = config.encoder_out_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1)
        self.apply(initialize)

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> CausalVideoVAE:
        """A model with fresh weights from the contents of a config.json; raises ValueError for what it cannot be."""
        return cls(VAEConfig.from_dict(values))

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> CausalVideoVAE:
        """The model saved in a directory, in float32 and in evaluation mode.

        The directory holds config.json and weights: `*.safetensors` or `*.bin`, one file or several with an index.
        Raises FileNotFoundError where a file is missing, ValueError for a config of another model or more than one set
        of weights, RuntimeError for missing, unexpected or mis-shaped tensors.
        """
        directory = Path(directory)
        config = VAEConfig.from_dict(read_config(directory))
        weights = read_weights(directory)
        with torch.device("meta"):  # shapes only: the weights come from the file
            vae = cls(config)
        vae.load_state_dict(weights, strict=True, assign=True)
        return vae.float().eval()

    def save_pretrained(self, directory: str | PathLike[str], max_shard_size: int | None = None) -> None:
        """Writes config.json and diffusion_pytorch_model.safetensors, in the dtype of the weights.

        Weights of more than `max_shard_size` bytes are split into files of at most that, with an index. Raises
        ValueError where the directory holds weights under other names.
        """
        config = {"_class_name": "CausalVideoVAE", **self.config.to_dict()}
        write_checkpoint(Path(directory), config, self.state_dict(), max_shard_size)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of B C T H W video in [-1, 1]; its tensors are B z t h w.

        Raises ValueError unless the frames are one more than a multiple of the temporal compression.
        """
        require_channels("video", "B C T H W", x, self.config.encoder_in_channels)
        frames, factor = x.shape[2], 2 ** sum(self.config.encoder_temporal_down_sample)
        if frames % factor != 1 % factor:
            fitting = frames + (1 - frames) % factor
            raise ValueError(f"video has {frames} frames, expected {factor}k+1, such as {fitting}: pad or trim it")
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """B C T H W video around [-1, 1], not clamped, of B z t h w latents."""
        require_channels("latents", "B z t h w", z, self.config.decoder_in_channels)
        return self.decoder(self.post_quant_conv(z))


def require_channels(name: str, axes: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} of shape {tuple(x.shape)}: expected {axes} with {channels} channels")


def initialize(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and zero biases, for convolutions and linear layers."""
    if isinstance(module, nn.Conv3d | nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
