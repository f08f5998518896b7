"""Mean and standard deviation of the latents of a data set, channel by channel: b t h w z of latents."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from flax_vae.models.latents import LatentScaling


@dataclass(frozen=True)
class Moments:
    """Count and mean of each channel, and the sum of its squared deviations from the mean."""

    count: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, mean: np.ndarray, logvar: np.ndarray) -> Self:
        """Returns those of latents drawn from a posterior (..., z), whose own variance counts too."""
        mean, logvar = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (mean, logvar))
        centre = mean.mean(axis=0) if len(mean) else np.zeros(mean.shape[-1])
        squares = (np.square(mean - centre) + np.exp(logvar)).sum(axis=0)
        return cls(len(mean), tuple(centre.tolist()), tuple(squares.tolist()))

    def __add__(self, other: "Moments") -> "Moments":
        """Merges those of two sets of values (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        if not count:
            return self
        delta = np.subtract(other.mean, self.mean)
        mean = np.asarray(self.mean) + delta * (other.count / count)
        squares = np.add(self.squares, other.squares) + np.square(delta) * (self.count * other.count / count)
        return Moments(count, tuple(mean.tolist()), tuple(squares.tolist()))

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel."""
        return tuple(np.sqrt(np.asarray(self.squares) / self.count).tolist())

    def overall(self) -> str:
        """Returns mean and standard deviation over all channels, as text."""
        if not self.count:
            return "none"
        mean = np.mean(self.mean)
        std = np.sqrt(np.mean(np.square(self.std) + np.square(np.subtract(self.mean, mean))))
        return f"{mean:.4f}, {std:.4f}"


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of the first latent frames of clips, and of the frames after them."""

    first: Moments
    rest: Moments

    @classmethod
    def of(cls, mean: np.ndarray, logvar: np.ndarray, start: int = 0) -> Self:
        """Returns those of a posterior (b, t, h, w, z) whose first frame is number `start` of its clip."""
        cut = int(start == 0)
        return cls(Moments.of(mean[:, :cut], logvar[:, :cut]), Moments.of(mean[:, cut:], logvar[:, cut:]))

    def __add__(self, other: "LatentStatistics") -> "LatentStatistics":
        """Merges those of two sets of latents."""
        return LatentStatistics(self.first + other.first, self.rest + other.rest)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` returned; ValueError for anything else."""
        try:
            parts = (values["first"], values["rest"])
            return cls(*(Moments(part["count"], tuple(part["mean"]), tuple(part["squares"])) for part in parts))
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected the statistics of latents, got {values!r:.99}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON can hold them."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """Returns count, mean and standard deviation of every channel, of the first frames and of the rest."""
        parts = {"first": self.first, "rest": self.rest}.items()
        return {name: {"count": m.count, "mean": m.mean, "std": m.std if m.count else None} for name, m in parts}

    def scaling(self) -> LatentScaling:
        """Returns the scaling that brings these latents to mean 0 and standard deviation 1, channel by channel.

        Raises ValueError where there are only first frames, as of images, and for a channel that never changes.
        """
        for name, moments in (("first", self.first), ("later", self.rest)):
            if not moments.count or 0 in moments.std:
                what = "none" if not moments.count else "a channel that never changes"
                raise ValueError(f"no scaling can be made: of the {name} frames of clips there is {what}")
        return LatentScaling(
            first_shift=self.first.mean,
            first_scale=tuple(1 / std for std in self.first.std),
            rest_shift=self.rest.mean,
            rest_scale=tuple(1 / std for std in self.rest.std),
        )
