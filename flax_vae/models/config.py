"""The configuration of the VAE: the keys of the public config.json, checked, and how to run it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from flax_vae.ops.geometry import latent_frames, pixel_frames

MAX_BLOCKS, MAX_LAYERS, MAX_CHANNELS = 16, 64, 2**16
RUN_SETTINGS = {"remat", "frame_by_frame"}  # fields that no config.json has
_DOWN, _UP = "DownEncoderBlockCausal3D", "UpDecoderBlockCausal3D"


@dataclass(frozen=True)
class VAEConfig:
    """What a checkpoint's config.json says: every field but the last two is a public key, by default as released.

    Lists have one entry a block, in the order in which the encoder or the decoder runs its blocks;
    `decoder_block_out_channels` alone is given from the pixels to the latents. `encoder_double_z`,
    `add_post_quant_conv`, `encoder_type` and `decoder_type` describe what is always so and change nothing.

    `remat` and `frame_by_frame` are of the run, not of the checkpoint: no config.json has them. Both give the same
    values in less memory; switch them on with `dataclasses.replace(config, remat=True)`. With `remat` a gradient keeps
    only what passes from block to block and computes the inside of each block a second time. XLA's CPU backend does
    that too early to save memory, unless its pass cse_barrier_expander is disabled (xla_disable_hlo_passes); it needs
    nothing elsewhere. With `frame_by_frame` a frame goes through as many blocks as can take one before the next does,
    in the memory of one frame, in a gradient too: for frames so large that those of one latent do not fit.

    Raises ValueError naming every key whose value is wrong or not supported.
    """

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
    remat: bool = False
    frame_by_frame: bool = False

    def __post_init__(self):
        problems = type_problems(self)  # values can only be judged once the types are right
        problems = problems or [*side_problems(self, "encoder"), *side_problems(self, "decoder"), *whole_problems(self)]
        if problems:
            raise ValueError("this config is not supported:\n  " + "\n  ".join(problems))

    @classmethod
    def full(cls) -> "VAEConfig":
        """The released model: 335,402,067 parameters."""
        return cls()

    @classmethod
    def small(cls) -> "VAEConfig":
        """The same network, narrow enough for a CPU."""
        return narrow((32, 64, 96, 128), groups=16, encoder_layers=1, decoder_layers=2)

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """The same network, for tests and first steps."""
        return narrow((16, 32, 48, 64), groups=8, encoder_layers=1, decoder_layers=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """Reads the contents of a config.json; ValueError names keys that are not public and unsupported values."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a config must be an object of keys and values, got {type(values).__name__}")
        if not all(isinstance(key, str) for key in values):
            raise ValueError(f"config keys must be strings, got {', '.join(map(repr, values))}")
        name = values.get("_class_name", "CausalVideoVAE")
        if name != "CausalVideoVAE":
            raise ValueError(f"_class_name is {name!r}: this is the config of another model, expected 'CausalVideoVAE'")
        known = {field.name for field in fields(cls)} - RUN_SETTINGS
        unknown = sorted(key for key in values if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(f"unknown config keys: {', '.join(unknown)}; a config.json has no such settings")
        given: dict[str, Any] = {}
        for key in known & set(values):
            given[key] = tuple(values[key]) if isinstance(values[key], list) else values[key]
        return cls(**given)

    @classmethod
    def from_json(cls, path: str | PathLike) -> "VAEConfig":
        """Reads a config.json; ValueError names the file and what is wrong in it."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Gives every public key, as a config.json holds them."""
        public = {key: value for key, value in asdict(self).items() if key not in RUN_SETTINGS}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in public.items()}
        return values | {"_class_name": "CausalVideoVAE"}

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, which is half of what the encoder puts out."""
        return self.encoder_out_channels

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent spans in height and in width."""
        return 2 ** sum(self.encoder_spatial_down_sample)

    @property
    def temporal_factor(self) -> int:
        """Frames a latent spans, the first one apart."""
        return 2 ** sum(self.encoder_temporal_down_sample)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Gives (t, h, w, channels) of a clip's latents; ValueError unless `frames` is temporal_factor * k + 1."""
        if min(height, width) < 1:
            raise ValueError(f"a frame must have at least one pixel, got {height}x{width}")
        rows, columns = (-(-pixels // self.spatial_factor) for pixels in (height, width))
        return latent_frames(frames, self.temporal_factor), rows, columns, self.latent_channels

    def video_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Gives (T, H, W, channels) of the clip that latents of this many frames, rows and columns decode to."""
        rows, columns = (latents * self.spatial_factor for latents in (height, width))
        return pixel_frames(frames, self.temporal_factor), rows, columns, self.decoder_out_channels


def narrow(widths: tuple[int, ...], groups: int, encoder_layers: int, decoder_layers: int) -> VAEConfig:
    """Gives the released network with other widths, norm groups and layers per block."""
    return VAEConfig(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_norm_num_groups=groups,
        decoder_norm_num_groups=groups,
        encoder_layers_per_block=(encoder_layers,) * 4,
        decoder_layers_per_block=(decoder_layers,) * 4,
    )


def type_problems(config: VAEConfig) -> list[str]:
    """Lists the keys whose value has the wrong type."""
    problems = []
    for key, hint in get_type_hints(VAEConfig).items():
        value, many = getattr(config, key), get_origin(hint) is tuple
        kind = get_args(hint)[0] if many else hint
        entries = value if many and isinstance(value, tuple) else (value,)
        allowed = (int, float) if kind is float else (kind,)
        fits = all(type(entry) in allowed for entry in entries) and isinstance(value, tuple) == many
        if not fits or (many and not value):
            problems.append(f"{key} must be {f'a list of {kind.__name__}' if many else kind.__name__}, got {value!r}")
    return problems


def side_problems(config: VAEConfig, side: str) -> list[str]:
    """Lists what is wrong with the encoder's or the decoder's own keys."""
    values = {key.removeprefix(f"{side}_"): value for key, value in vars(config).items() if key.startswith(side)}
    lists = {key: value for key, value in values.items() if isinstance(value, tuple)}
    blocks, groups = len(values["block_out_channels"]), values["norm_num_groups"]
    types = lists["down_block_types" if side == "encoder" else "up_block_types"]
    supported = _DOWN if side == "encoder" else _UP
    counts = [values["in_channels"], values["out_channels"], groups, *values["block_out_channels"]]
    checks = {
        f"{side}: at most {MAX_BLOCKS} blocks, got {blocks}": blocks <= MAX_BLOCKS,
        **{
            f"{side}_{key} must have {blocks} entries, one a block, got {len(v)}": len(v) == blocks
            for key, v in lists.items()
        },
        f"{side}_*_block_types must be {supported}, got {', '.join(sorted(set(types)))}": set(types) == {supported},
        f"{side}_act_fn must be 'silu', got {values['act_fn']!r}": values["act_fn"] in ("silu", "swish"),
        f"{side} channels and norm groups must be 1 to {MAX_CHANNELS}, got {counts}": all(
            0 < n <= MAX_CHANNELS for n in counts
        ),
        f"{side}_layers_per_block must be 1 to {MAX_LAYERS}, got {values['layers_per_block']}": all(
            0 < n <= MAX_LAYERS for n in values["layers_per_block"]
        ),
        f"{side}_norm_num_groups ({groups}) must divide {values['block_out_channels']}": groups > 0
        and not any(width % groups for width in values["block_out_channels"]),
        f"{side}_block_dropout must be at least 0 and less than 1, got {values['block_dropout']}": all(
            0 <= rate < 1 for rate in values["block_dropout"]
        ),
    }
    return [problem for problem, fine in checks.items() if not fine]


def whole_problems(config: VAEConfig) -> list[str]:
    """Lists where the encoder and the decoder do not fit each other, and settings that nothing implements."""
    down = sum(config.encoder_spatial_down_sample), sum(config.encoder_temporal_down_sample)
    up = sum(config.decoder_spatial_up_sample), sum(config.decoder_temporal_up_sample)
    checks = {
        f"sample_size and downsample_scale must be at least 1, got {config.sample_size} and "
        f"{config.downsample_scale}": min(config.sample_size, config.downsample_scale) >= 1,
        f"scaling_factor must be finite, got {config.scaling_factor}": math.isfinite(config.scaling_factor),
        "interpolate must be false: interpolating samplers are not implemented": not config.interpolate,
        f"decoder_in_channels ({config.decoder_in_channels}) must equal encoder_out_channels "
        f"({config.encoder_out_channels})": config.decoder_in_channels == config.encoder_out_channels,
        f"the decoder doubles space and time {up} times, but the encoder halves them {down} times": up == down,
    }
    return [problem for problem, fine in checks.items() if not fine]
