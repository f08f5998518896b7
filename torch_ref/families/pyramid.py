"""The Pyramid-Flow family. Shapes: B batch, C channels, T frames, H W pixels; z channels and t h w of latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.checkpoint import read_config, read_weights, write_checkpoint
from torch_ref.layers.attention import Attention
from torch_ref.layers.conv import CausalConv3d
from torch_ref.layers.norm import CausalGroupNorm
from torch_ref.layers.resample import SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample
from torch_ref.layers.resnet import CausalResnetBlock
from torch_ref.models.latents import LatentScaling
from torch_ref.models.posterior import DiagonalGaussian

DOWN_BLOCK = "DownEncoderBlockCausal3D"
UP_BLOCK = "UpDecoderBlockCausal3D"


@dataclass(frozen=True)
class CausalVideoVAEConfig:
    """One field for each key of config.json; the defaults are the released model.

    Tuples hold one entry a block: `encoder_*` in the order of the down blocks, `decoder_*` in that of the up blocks,
    but for `decoder_block_out_channels`, which runs the other way: its last entry is the first up block's.
    `encoder_double_z`, `encoder_type`, `decoder_type`, `sample_size`, `scaling_factor`, `add_post_quant_conv` and
    `downsample_scale` are kept for the file's sake and change nothing here.

    Raises ValueError, naming the key, for values that describe another model than this one.
    """

    encoder_in_channels: int = 3
    encoder_out_channels: int = 16
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_down_block_types: tuple[str, ...] = (DOWN_BLOCK,) * 4
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_block_dropout: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    encoder_act_fn: str = "silu"
    encoder_norm_num_groups: int = 32
    encoder_double_z: bool = True
    encoder_type: str = "causal_vae_conv"
    decoder_in_channels: int = 16
    decoder_out_channels: int = 3
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_up_block_types: tuple[str, ...] = (UP_BLOCK,) * 4
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_block_dropout: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    decoder_act_fn: str = "silu"
    decoder_norm_num_groups: int = 32
    decoder_type: str = "causal_vae_conv"
    sample_size: int = 256
    scaling_factor: float = 0.18215
    add_post_quant_conv: bool = True
    interpolate: bool = False
    downsample_scale: int = 8

    def __post_init__(self) -> None:
        self._require("interpolate", self.interpolate is False, "false")
        latents_fit = self.decoder_in_channels == self.encoder_out_channels
        self._require("decoder_in_channels", latents_fit, f"encoder_out_channels, {self.encoder_out_channels}")
        self._check_blocks("encoder", "down", DOWN_BLOCK)
        self._check_blocks("decoder", "up", UP_BLOCK)

    def _check_blocks(self, side: str, direction: str, block_type: str) -> None:
        widths = getattr(self, f"{side}_block_out_channels")
        groups = getattr(self, f"{side}_norm_num_groups")
        self._require(f"{side}_block_out_channels", isinstance(widths, tuple) and len(widths) > 0, "a list")
        divisible = all(width % groups == 0 for width in widths)
        self._require(f"{side}_block_out_channels", divisible, f"multiples of {side}_norm_num_groups, {groups}")
        for field in fields(self):
            if field.name.startswith(side) and isinstance(field.default, tuple):
                value = getattr(self, field.name)
                one_a_block = isinstance(value, tuple) and len(value) == len(widths)
                self._require(field.name, one_a_block, f"a list of {len(widths)} entries, one a block")
        layers = getattr(self, f"{side}_layers_per_block")
        types = getattr(self, f"{side}_{direction}_block_types")
        self._require(f"{side}_layers_per_block", min(layers) >= 1, "at least 1 for every block")
        self._require(f"{side}_{direction}_block_types", set(types) == {block_type}, f"{block_type!r} for every block")
        self._require(f"{side}_act_fn", getattr(self, f"{side}_act_fn") == "silu", "'silu'")

    def _require(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key} is {getattr(self, key)!r}, but this model needs {expected}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CausalVideoVAEConfig:
        """Reads the contents of a config.json; keys that start with "_" are notes of the writer and are passed over.

        Raises ValueError, naming them, for keys that are not of this model.
        """
        settings: dict[str, Any] = {}
        for key, value in values.items():
            if not key.startswith("_"):
                settings[key] = tuple(value) if isinstance(value, list) else value
        unknown = sorted(settings.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown config keys {unknown}: this model has {[field.name for field in fields(cls)]}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, with every key."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


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


class Encoder(nn.Module):
    """Video in [-1, 1], B C T H W, to moments, B 2z t h w: z channels of mean, then z of log variance."""

    def __init__(self, config: CausalVideoVAEConfig):
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


class Decoder(nn.Module):
    """Latents, B z t h w, to video around [-1, 1], B C T H W; the output is not clamped."""

    def __init__(self, config: CausalVideoVAEConfig):
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


class CausalVideoVAE(nn.Module):
    """The causal video VAE of the Pyramid-Flow checkpoints; `state_dict()` has exactly their keys.

    With the released configuration, 8k+1 frames of H x W pixels become k+1 latent frames of ceil(H/8) x ceil(W/8).
    Fresh weights are normal with a standard deviation of 0.02, biases zero, norms one and zero.
    """

    def __init__(self, config: CausalVideoVAEConfig):
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
        return cls(CausalVideoVAEConfig.from_dict(values))

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> CausalVideoVAE:
        """The model saved in a directory, in float32 and in evaluation mode.

        The directory holds config.json and weights: `*.safetensors` or `*.bin`, one file or several with an index.
        Raises FileNotFoundError where a file is missing, ValueError for a config of another model or more than one set
        of weights, RuntimeError for missing, unexpected or mis-shaped tensors.
        """
        directory = Path(directory)
        config = CausalVideoVAEConfig.from_dict(read_config(directory))
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


# The numbers published with the diffusion models "flux" and "sd3".
RELEASED_SCALINGS = {
    "flux": LatentScaling(-0.04, 1 / 1.8726, -0.2343, 1 / 3.0986),
    "sd3": LatentScaling(0.1490, 1 / 1.8415, -0.2343, 1 / 3.0986),
}
