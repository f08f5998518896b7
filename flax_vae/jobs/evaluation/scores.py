"""What an evaluation finds: the scores of clips, frame by frame, and frames to look at: H W pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_vae.jobs.clip import Clip
from flax_vae.metrics.fvd import frechet_distance
from flax_vae.metrics.seams import Seam, seam

NAMES = ("psnr", "ssim", "lpips")
Failure = tuple[Path, str]  # a clip that is left out, and why


@dataclass(frozen=True)
class Sample:
    """A frame before and after, uint8 (H, W, 3)."""

    path: Path
    number: int
    psnr: float
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class ClipQuality:
    """A clip, the scores of each of its frames by name (psnr in dB, ssim, lpips), and what else is kept of it."""

    clip: Clip
    scores: dict[str, list[float]]
    windows: list[tuple[np.ndarray, np.ndarray]]  # features, of the input, of the reconstruction
    samples: list[Sample]

    @property
    def frames(self) -> int:
        """Frames that were measured."""
        return len(self.scores["psnr"])

    def mean(self, name: str) -> float:
        """Returns the mean of a score over the frames."""
        return float(np.mean(self.scores[name]))


@dataclass(frozen=True)
class Evaluation:
    """All clips that were measured, why others were not, frames to look at, and the frames of a chunk and a latent.

    `has_rfvd` says whether features for it were taken, of which there may be too few.
    """

    clips: list[ClipQuality]
    failed: list[Failure]
    samples: list[Sample]
    chunk: int
    factor: int
    has_rfvd: bool

    @property
    def names(self) -> list[str]:
        """The scores that were measured."""
        return [name for name in NAMES if name in self.clips[0].scores]

    @property
    def count(self) -> int:
        """Frames of all clips."""
        return sum(clip.frames for clip in self.clips)

    def mean(self, name: str) -> float:
        """Returns the mean of a score over the clips: each counts once, however long."""
        return float(np.mean([clip.mean(name) for clip in self.clips]))

    def frames(self, name: str) -> list[list[float]]:
        """Returns a score of every frame of every clip."""
        return [clip.scores[name] for clip in self.clips]

    def seam(self, clips: Sequence[ClipQuality] | None = None) -> Seam | None:
        """Returns the seam score of some clips, by default of all; None where they are too short."""
        scores = [clip.scores["psnr"] for clip in (self.clips if clips is None else clips)]
        return seam(scores, self.chunk, self.factor)

    @property
    def windows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The features of the windows of all clips."""
        return [window for clip in self.clips for window in clip.windows]

    @property
    def rfvd(self) -> float | None:
        """The Frechet distance of the features of all windows before and after; None of fewer than two."""
        windows = self.windows
        return frechet_distance(*map(np.stack, zip(*windows, strict=True))) if len(windows) > 1 else None


def seam_text(seam: Seam) -> str:
    """Returns a seam score with its standard error."""
    return f"{seam.score:+.2f}" + (f" \N{PLUS-MINUS SIGN} {seam.error:.2f}" if seam.error is not None else "")
