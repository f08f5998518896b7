"""The Pyramid-Flow family: `CausalVideoVAE`. B batch, T frames, H W pixels, C channels; t h w z of latents.

Source: the layout and the behaviour of the public checkpoints.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar, Self

from flax import nnx

from flax_vae.io.port import same_names
from flax_vae.io.weights import Spec
from flax_vae.layers.attention import Attention
from flax_vae.layers.conv import CausalConv3d, Clip
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.resample import SpatialDownsample, SpatialUpsample, TemporalDownsample, TemporalUpsample
from flax_vae.layers.resnet import CausalResnetBlock, Head
from flax_vae.layers.sequence import Chain, Coder
from flax_vae.models.config import VAEConfig, type_problems
from flax_vae.models.latents import LatentScaling
from flax_vae.models.posterior import Latents
from flax_vae.models.vae import VideoVAE

MAX_BLOCKS, MAX_LAYERS, MAX_CHANNELS = 16, 64, 2**16
RELEASED_GROUPS = 32  # of the norms, which the shapes of weights do not show
_DOWN, _UP = "DownEncoderBlockCausal3D", "UpDecoderBlockCausal3D"
_SIDES = (("encoder", "down", _DOWN), ("decoder", "up", _UP))


@dataclass(frozen=True)
class CausalVideoVAEConfig(VAEConfig):
    """The keys of the public config.json, by default as released.

    Lists have one entry a block, in the order in which the encoder or the decoder runs its blocks;
    `decoder_block_out_channels` alone is given from the pixels to the latents. `encoder_double_z`,
    `add_post_quant_conv`, `encoder_type` and `decoder_type` describe what is always so and change nothing. Raises
    ValueError naming every key whose value is wrong or not supported.
    """

    class_name: ClassVar[str] = "CausalVideoVAE"

    encoder_in_channels: int = 3
    encoder_out_channels: int = 16
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_down_block_types: tuple[str, ...] = (_DOWN,) * 4
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_block_dropout: tuple[float, ...] = (0.0,) * 4
    encoder_act_fn: str = "silu"
    encoder_norm_num_groups: int = 32
    encoder_double_z: bool = True
    encoder_type: str = "causal_vae_conv"
    decoder_in_channels: int = 16
    decoder_out_channels: int = 3
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_up_block_types: tuple[str, ...] = (_UP,) * 4
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_block_dropout: tuple[float, ...] = (0.0,) * 4
    decoder_act_fn: str = "silu"
    decoder_norm_num_groups: int = 32
    decoder_type: str = "causal_vae_conv"
    sample_size: int = 256
    scaling_factor: float = 0.18215
    add_post_quant_conv: bool = True
    interpolate: bool = False
    downsample_scale: int = 8

    def __post_init__(self):
        if problems := type_problems(self) or problems_of(self):  # values only where all types are right
            raise ValueError("this config is not supported:\n  " + "\n  ".join(problems))

    @classmethod
    def released(cls) -> Self:
        """The released model: 335,402,067 parameters."""
        return cls()

    @classmethod
    def small(cls) -> "CausalVideoVAEConfig":
        """The same network, narrow enough for a CPU: 14.4M parameters."""
        return narrow((32, 64, 96, 128), groups=16, encoder_layers=1, decoder_layers=2)

    @classmethod
    def tiny(cls) -> "CausalVideoVAEConfig":
        """The same network, for tests and first steps: 3.2M parameters."""
        return narrow((16, 32, 48, 64), groups=8, encoder_layers=1, decoder_layers=1)

    @property
    def pixel_channels(self) -> int:
        """Channels of a pixel."""
        return self.encoder_in_channels

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; the encoder's output has as many means and as many log variances."""
        return self.encoder_out_channels

    @property
    def spatial_factor(self) -> int:
        """Pixels that a latent spans in height and in width."""
        return 2 ** sum(self.encoder_spatial_down_sample)

    @property
    def temporal_factor(self) -> int:
        """Frames that a latent spans, except the first."""
        return 2 ** sum(self.encoder_temporal_down_sample)

    def describe(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Returns the columns and rows of a table that shows encoder and decoder side by side."""
        keys = "in_channels out_channels block_out_channels layers_per_block norm_num_groups act_fn block_dropout"
        keys = [*keys.split(), "spatial_{}_sample", "temporal_{}_sample"]
        sides, values = (("encoder", "down"), ("decoder", "up")), self.to_dict()
        rows = [(k.format("down/up"), *(str(values[f"{s}_{k.format(d)}"]).strip("[]") for s, d in sides)) for k in keys]
        return ["", "encoder", "decoder"], rows

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Spec]) -> Self:
        """Reads the config off the names and shapes of weights; ValueError where they are not this model's.

        Shapes do not show the norms' groups: those of the released model are taken, with a warning.
        """
        conv, given = "conv2.conv.weight", dict[str, Any]()  # one in each residual block, of its width
        try:
            for side, direction, kind in _SIDES:
                blocks = [under(shapes, f"{side}.{direction}_blocks.{i}.") for i in range(MAX_BLOCKS + 1)]
                blocks = [block for block in blocks if block]
                widths = tuple(block[f"resnets.0.{conv}"][0] for block in blocks)
                space, time = (
                    tuple(f"{axes}{direction}samplers.0.conv.conv.weight" in block for block in blocks)
                    for axes in ("", "temporal_")
                )
                given |= {
                    f"{side}_layers_per_block": tuple(sum(name.endswith(conv) for name in block) for block in blocks),
                    f"{side}_{direction}_block_types": (kind,) * len(blocks),
                    f"{side}_block_out_channels": widths if side == "encoder" else widths[::-1],
                    f"{side}_spatial_{direction}_sample": space,
                    f"{side}_temporal_{direction}_sample": time,
                    f"{side}_block_dropout": (0.0,) * len(blocks),
                }
            latents = shapes["post_quant_conv.conv.weight"][0][0]
            given["encoder_in_channels"] = shapes["encoder.conv_in.conv.weight"][0][1]
            given["decoder_out_channels"] = shapes["decoder.conv_out.conv.weight"][0][0]
        except (KeyError, IndexError):
            raise ValueError(f"these are not the weights of a {cls.class_name}") from None
        config = cls(**given, encoder_out_channels=latents, decoder_in_channels=latents)
        warnings.warn(
            f"the norms are taken to have {RELEASED_GROUPS} groups, as released: no shape shows it; give a config.json",
            stacklevel=2,
        )
        return config


def under(shapes: Mapping[str, Spec], prefix: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the names with a prefix, which is taken off."""
    return {name.removeprefix(prefix): shape for name, (shape, _) in shapes.items() if name.startswith(prefix)}


def narrow(widths: tuple[int, ...], groups: int, encoder_layers: int, decoder_layers: int) -> CausalVideoVAEConfig:
    """Returns the released network with other widths.

    Args:
      widths: channels of the four blocks, from the pixels to the latents.
      groups: of the norms.
      encoder_layers, decoder_layers: residual blocks in each block.
    """
    return CausalVideoVAEConfig(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_norm_num_groups=groups,
        decoder_norm_num_groups=groups,
        encoder_layers_per_block=(encoder_layers,) * 4,
        decoder_layers_per_block=(decoder_layers,) * 4,
    )


def problems_of(config: CausalVideoVAEConfig) -> list[str]:
    """Lists what is wrong with each side's keys, where the sides do not fit, and what is not implemented."""
    sizes = config.sample_size, config.downsample_scale
    latents, moments = config.decoder_in_channels, config.encoder_out_channels
    down = sum(config.encoder_spatial_down_sample), sum(config.encoder_temporal_down_sample)
    up = sum(config.decoder_spatial_up_sample), sum(config.decoder_temporal_up_sample)
    checks = [
        (min(sizes) < 1, "sample_size and downsample_scale must be at least 1, got {} and {}".format(*sizes)),
        (not math.isfinite(config.scaling_factor), f"scaling_factor must be finite, got {config.scaling_factor}"),
        (config.interpolate, "interpolate must be false: interpolating samplers are not implemented"),
        (latents != moments, f"decoder_in_channels ({latents}) must equal encoder_out_channels ({moments})"),
        (up != down, f"the decoder doubles space and time {up} times, but the encoder halves them {down} times"),
    ]
    for side, direction, kind in _SIDES:
        values = {key.removeprefix(f"{side}_"): value for key, value in vars(config).items() if key.startswith(side)}
        widths, groups, layers = values["block_out_channels"], values["norm_num_groups"], values["layers_per_block"]
        blocks, kinds, dropout = len(widths), set(values[f"{direction}_block_types"]), values["block_dropout"]
        counts = [values["in_channels"], values["out_channels"], groups, *widths]
        is_counted = all(0 < count <= MAX_CHANNELS for count in counts)
        is_layered = all(0 < count <= MAX_LAYERS for count in layers)
        is_divided = groups > 0 and not any(width % groups for width in widths)
        is_dropout = all(0 <= rate < 1 for rate in dropout)
        checks += [
            (blocks > MAX_BLOCKS, f"{side}: at most {MAX_BLOCKS} blocks, got {blocks}"),
            (kinds != {kind}, f"{side}_*_block_types must be {kind}, got {', '.join(sorted(kinds))}"),
            (values["act_fn"] not in ("silu", "swish"), f"{side}_act_fn must be 'silu', got {values['act_fn']!r}"),
            (not is_counted, f"{side} channels and norm groups must be 1 to {MAX_CHANNELS}, got {counts}"),
            (not is_layered, f"{side}_layers_per_block must be 1 to {MAX_LAYERS}, got {layers}"),
            (not is_divided, f"{side}_norm_num_groups ({groups}) must divide {widths}"),
            (not is_dropout, f"{side}_block_dropout must be at least 0 and less than 1, got {dropout}"),
        ]
        lists = {key: len(value) for key, value in values.items() if isinstance(value, tuple)}
        checks += [
            (n != blocks, f"{side}_{key} must have {blocks} entries, one a block, got {n}") for key, n in lists.items()
        ]
    return [message for is_wrong, message in checks if is_wrong]


def resnet_blocks(channels: int, out_channels: int, num_layers: int, *args, rngs: nnx.Rngs) -> nnx.List:
    """Builds `num_layers` residual blocks, the first of which changes the number of channels."""
    if num_layers < 1:
        raise ValueError(f"a block has at least one residual block, got {num_layers}")
    widths = [channels] + [out_channels] * (num_layers - 1)
    return nnx.List(CausalResnetBlock(width, out_channels, *args, rngs=rngs) for width in widths)


class DownBlock(Chain):
    """Residual blocks, then half the height and width, then half the frames, where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        num_groups: int = 32,
        dropout: float = 0.0,
        spatial_downsample: bool = True,
        temporal_downsample: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        out = out_channels
        self.resnets = resnet_blocks(in_channels, out, num_layers, num_groups, dropout, rngs=rngs)
        self.downsamplers = nnx.List(SpatialDownsample(out, rngs=rngs) for _ in range(spatial_downsample))
        self.temporal_downsamplers = nnx.List(TemporalDownsample(out, rngs=rngs) for _ in range(temporal_downsample))

    def layers(self) -> list[Any]:
        """Lists them in the order in which they run."""
        return [*self.resnets, *self.downsamplers, *self.temporal_downsamplers]


class MidBlock(nnx.Module):
    """A residual block, attention within each frame, and another residual block."""

    frames_a_step = 1

    def __init__(self, channels: int, num_groups: int = 32, dropout: float = 0.0, *, rngs: nnx.Rngs):
        self.resnets = resnet_blocks(channels, channels, 2, num_groups, dropout, rngs=rngs)
        self.attentions = nnx.List([Attention(channels, num_groups, rngs=rngs)])

    def __call__(self, x: Clip, carry: Any = None) -> tuple[Clip, Any]:
        """Maps (B, T, H, W, C) to the same shape; returns it and the carry."""
        first, second = (None, None) if carry is None else carry
        x, first = self.resnets[0](x, first)
        x, second = self.resnets[1](self.attentions[0](x), second)
        return x, (first, second)


class UpBlock(Chain):
    """Residual blocks, then twice the height and width, then twice the frames, where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        num_groups: int = 32,
        dropout: float = 0.0,
        spatial_upsample: bool = True,
        temporal_upsample: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        out = out_channels
        self.resnets = resnet_blocks(in_channels, out, num_layers, num_groups, dropout, rngs=rngs)
        self.upsamplers = nnx.List(SpatialUpsample(out, rngs=rngs) for _ in range(spatial_upsample))
        self.temporal_upsamplers = nnx.List(TemporalUpsample(out, rngs=rngs) for _ in range(temporal_upsample))

    def layers(self) -> list[Any]:
        """Lists them in the order in which they run."""
        return [*self.resnets, *self.upsamplers, *self.temporal_upsamplers]


class Encoder(Coder):
    """Maps a clip (B, T, H, W, 3), pixels in [-1, 1], to moments (B, t, h, w, 2z), before `quant_conv`."""

    def __init__(self, config: CausalVideoVAEConfig, *, rngs: nnx.Rngs):
        super().__init__(strip_rows=config.spatial_factor)
        widths, groups = config.encoder_block_out_channels, config.encoder_norm_num_groups
        dropout = config.encoder_block_dropout
        self.conv_in = CausalConv3d(config.pixel_channels, widths[0], 3, rngs=rngs)
        halves = config.encoder_spatial_down_sample, config.encoder_temporal_down_sample
        blocks = zip(widths[:1] + widths, widths, config.encoder_layers_per_block, repeat(groups), dropout, *halves)
        self.down_blocks = nnx.List(DownBlock(*block, rngs=rngs) for block in blocks)
        self.mid_block = MidBlock(widths[-1], groups, dropout[-1], rngs=rngs)
        self.conv_norm_out = CausalGroupNorm(groups, widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def layers(self) -> list[Any]:
        """Lists the layers from pixels to moments."""
        return [self.conv_in, *self.down_blocks, self.mid_block, Head(self.conv_norm_out, self.conv_out)]


class Decoder(Coder):
    """Maps latents (B, t, h, w, z), after `post_quant_conv`, to a clip (B, T, H, W, 3), pixels about [-1, 1]."""

    def __init__(self, config: CausalVideoVAEConfig, *, rngs: nnx.Rngs):
        super().__init__()
        widths, groups = config.decoder_block_out_channels[::-1], config.decoder_norm_num_groups
        dropout = config.decoder_block_dropout
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, dropout[0], rngs=rngs)
        doubles = config.decoder_spatial_up_sample, config.decoder_temporal_up_sample
        blocks = zip(widths[:1] + widths, widths, config.decoder_layers_per_block, repeat(groups), dropout, *doubles)
        self.up_blocks = nnx.List(UpBlock(*block, rngs=rngs) for block in blocks)
        self.conv_norm_out = CausalGroupNorm(groups, widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], config.decoder_out_channels, 3, rngs=rngs)

    def layers(self) -> list[Any]:
        """Lists the layers from latents to pixels."""
        return [self.conv_in, self.mid_block, *self.up_blocks, Head(self.conv_norm_out, self.conv_out)]


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_keys(key: str) -> str:
    """Names the layout of old exports, whose attention projections, Linear or 1x1 Conv2d, have other names."""
    return re.sub(r"\bto_(?:q|k|v|out\.0)(?=\.\w+$)", lambda found: OLD_ATTENTION[found[0]], key)


REST_SCALING = (-0.2343, 1 / 3.0986)  # of the frames after the first


class CausalVideoVAE(VideoVAE):
    """The causal video VAE of the Pyramid-Flow checkpoints: 8k + 1 frames become k + 1 latents of 8x8 pixels."""

    config_class = CausalVideoVAEConfig
    layouts: ClassVar = {"diffusers": same_names, "old": old_keys}
    presets: ClassVar = {
        "pyramid-flow": CausalVideoVAEConfig.released,
        "pyramid-flow-small": CausalVideoVAEConfig.small,
        "pyramid-flow-tiny": CausalVideoVAEConfig.tiny,
    }
    released_scalings: ClassVar = {
        "flux": LatentScaling(-0.04, 1 / 1.8726, *REST_SCALING),
        "sd3": LatentScaling(0.1490, 1 / 1.8415, *REST_SCALING),
    }
    last_kernel = ("decoder", "conv_out", "conv", "kernel")

    def __init__(self, config: CausalVideoVAEConfig, *, rngs: nnx.Rngs):
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, 1, rngs=rngs)
        self.post_quant_conv = CausalConv3d(z, z, 1, rngs=rngs)

    def after_encoder(self, moments: Latents) -> Latents:
        """Maps the encoder's output to moments by a 1x1x1 convolution."""
        return self.quant_conv(moments, ())[0]

    def before_decoder(self, z: Latents) -> Latents:
        """Maps latents to the decoder's input by a 1x1x1 convolution."""
        return self.post_quant_conv(z, ())[0]
