"""Latents as a diffusion model wants them: shifted and scaled, the first frame and the later ones apart."""

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
    """Maps latents z to (z - shift) * scale and back, with one shift and scale (or one a channel) for the first
    frame of a clip, or an image, and others for the frames after it.

    The first frame differs because it is encoded from one frame, the later ones from several each. Raises ValueError
    for a scale of 0, and for statistics that are neither one nor one a channel.
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
        """Reads what `to_dict` gives; ValueError for anything else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ValueError(f"expected the statistics {', '.join(names)}, got {values!r:.99}")
        lists = {name: x if isinstance(x := values[name], list) else [x] for name in names}
        numbers = [number for entries in lists.values() for number in entries]
        if [] in lists.values() or not all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in numbers):
            raise ValueError("statistics must be finite numbers, one or one a channel")
        given = {name: tuple(map(float, entries)) for name, entries in lists.items()}
        return cls(**{name: given[name] if isinstance(values[name], list) else given[name][0] for name in names})

    def to_dict(self) -> dict[str, float | list[float]]:
        """Gives the four statistics as JSON can hold them."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    def normalize(self, latents: Latents, start: bool = True) -> Latents:
        """Gives (z - shift) * scale of (B, t, h, w, z); `start` is False for a later chunk of a stream."""
        shift, scale = self._per_frame(latents, start)
        return (latents - shift) * scale

    def denormalize(self, latents: Latents, start: bool = True) -> Latents:
        """Undoes `normalize`: z / scale + shift."""
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
