"""What a public config.json says about the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DOWN_BLOCK = "DownEncoderBlockCausal3D"
UP_BLOCK = "UpDecoderBlockCausal3D"


@dataclass(frozen=True)
class VAEConfig:
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
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
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
