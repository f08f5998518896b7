"""Whether quality dips where a clip was cut into chunks: scores by frame, by position in a chunk, and at borders."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

MEDIAN_ERROR = math.sqrt(math.pi / 2) / 1.349  # of a normal distribution: error of the median, and quartile range
SEAM = (
    "A border of chunks lies between the first frame of a chunk and the last one of the chunk before. Each of the two "
    "is compared with the mean of the frames one latent earlier and one latent later, which have the same place in "
    "their latents but lie inside chunks, so that neither the pattern of a latent nor a trend of the clip counts. "
    "`first` and `last` are the median differences over all borders, in dB of PSNR; few scene cuts do not change a "
    "median. The score is the lower of the two: about 0, within the standard error (from the quartiles), where there "
    "is no seam; below 0 where frames are worse at borders. The border after the first frame of a clip, a chunk of "
    "its own, does not count."
)


def by_frame(clips: Sequence[Sequence[float] | np.ndarray]) -> list[float]:
    """Returns the mean of each frame number, over the clips that are long enough."""
    return [float(np.mean([clip[i] for clip in clips if i < len(clip)])) for i in range(max(map(len, clips)))]


def by_position(clips: Sequence[Sequence[float] | np.ndarray], chunk: int) -> list[float | None]:
    """Returns the mean of each position in a chunk of `chunk` frames, None where no clip has it.

    The first frame of a clip, a chunk of its own, is left out.
    """
    positions = [[value for clip in clips for value in clip[1 + i :: chunk]] for i in range(chunk)]
    return [float(np.mean(values)) if values else None for values in positions]


@dataclass(frozen=True)
class Seam:
    """By how many dB frames at the borders of chunks are better than others, as `SEAM` says."""

    first: float
    last: float
    first_error: float | None
    last_error: float | None
    borders: int

    @property
    def score(self) -> float:
        """The lower difference, in dB."""
        return min(self.first, self.last)

    @property
    def error(self) -> float | None:
        """The standard error of the score; None where there is one border."""
        return self.first_error if self.first <= self.last else self.last_error

    def to_dict(self) -> dict[str, float | int | None]:
        """Returns all numbers by name."""
        return {"score": self.score, "standard_error": self.error, **asdict(self)}


def seam(clips: Sequence[Sequence[float] | np.ndarray], chunk: int, factor: int) -> Seam | None:
    """Compares the PSNR of frames at the borders of chunks with that of frames inside, as `SEAM` says.

    `clips` are the PSNR of each of their frames in dB; a chunk, except the first, has `chunk` frames, a latent
    `factor`. Returns None where chunks have fewer than two latents, and where no clip is long enough.
    """
    if shortest(chunk, factor) is None:
        return None
    step = max(factor, 2)
    first = [value for clip in clips for value in _above(clip, range(1 + chunk, len(clip) - step, chunk), step)]
    last = [value for clip in clips for value in _above(clip, range(chunk, len(clip) - step - 1, chunk), step)]
    if not first:
        return None
    errors = _standard_error(first), _standard_error(last)
    return Seam(float(np.median(first)), float(np.median(last)), *errors, borders=len(first))


def shortest(chunk: int, factor: int) -> int | None:
    """Returns the frames of the shortest clip that has a seam score; None where chunks have fewer than two latents."""
    step = max(factor, 2)
    return None if chunk < 2 * step else chunk + step + 2


def _above(values, indices, step):
    return [values[i] - (values[i - step] + values[i + step]) / 2 for i in indices]


def _standard_error(values):
    if len(values) < 2:
        return None
    low, high = np.quantile(values, [0.25, 0.75])
    return float(MEDIAN_ERROR * (high - low) / math.sqrt(len(values)))
