"""Latents normalised for a diffusion model, the first frame apart from the later ones: b t h w z of latents."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_vae.models.posterior import Latents

Statistic = float | tuple[float, ...]


@dataclass(frozen=True)
class LatentScaling:
    """Maps latents z to (z - shift) * scale and back.

    The first frame of a clip, or an image, has statistics of its own: it is encoded from one frame, a later one from
    several. A statistic is one number, or one a channel. Raises ValueError for a scale of 0.
    """

    first_shift: Statistic
    first_scale: Statistic
    rest_shift: Statistic
    rest_scale: Statistic

    def __post_init__(self):
        if not (np.all(self.first_scale) and np.all(self.rest_scale)):
            raise ValueError(f"a scale of 0 cannot be undone, got {self.first_scale} and {self.rest_scale}")

    @classmethod
    def from_dict(cls, values: Any) -> "LatentScaling":
        """Reads what `to_dict` returns; ValueError for anything else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ValueError(f"expected the statistics {', '.join(names)}, got {values!r:.99}")
        lists = [x if isinstance(x, list) else [x] for x in values.values()]
        numbers = [number for entries in lists for number in entries]
        if [] in lists or not all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in numbers):
            raise ValueError("statistics must be finite numbers, one or one a channel")
        return cls(**{name: tuple(map(float, x)) if isinstance(x, list) else float(x) for name, x in values.items()})

    def to_dict(self) -> dict[str, float | list[float]]:
        """Returns the four statistics as JSON can hold them."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    def normalize(self, latents: Latents, start: bool = True) -> Latents:
        """Returns (z - shift) * scale of (b, t, h, w, z); `start` is False for a later chunk of a stream."""
        shift, scale = self._per_frame(latents, start)
        return (latents - shift) * scale

    def denormalize(self, latents: Latents, start: bool = True) -> Latents:
        """Inverts `normalize`: z / scale + shift."""
        shift, scale = self._per_frame(latents, start)
        return latents / scale + shift

    def _per_frame(self, latents: Latents, start: bool):
        is_first = (jnp.arange(latents.shape[1]) == 0)[None, :, None, None, None] & start
        for statistic in (self.first_shift, self.first_scale, self.rest_shift, self.rest_scale):
            if np.size(statistic) not in (1, latents.shape[-1]):
                raise ValueError(f"{np.size(statistic)} statistics do not fit latents of shape {latents.shape}")
        pairs = ((self.first_shift, self.rest_shift), (self.first_scale, self.rest_scale))
        per_channel = [[jnp.asarray(v, latents.dtype).reshape(1, 1, 1, 1, -1) for v in pair] for pair in pairs]
        return [jnp.where(is_first, first, rest) for first, rest in per_channel]
