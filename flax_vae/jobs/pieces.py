"""Runs a stream chunk by chunk, and writes piece by piece: whole files, after each of which a job can be resumed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from flax_vae.jobs.job import Job
from flax_vae.jobs.screen import Meter
from flax_vae.runtime.stream import Stream, cut

PIECE_LATENTS = 16  # of a piece, and one more in the first; chunks are a power of two up to this
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """The batch that a step takes, how many of its frames and latents are not padding, and the pixels it is from.

    `times` are the seconds at which its frames begin to be shown, without padding, and at which the last one ends.
    """

    data: np.ndarray
    frames: int
    latents: int
    is_last: bool
    times: Sequence[Fraction]
    pixels: np.ndarray | None = None


Results = Iterator[tuple[Chunk, Any]]  # of the chunks of one piece, as they are computed


def run(job: Job, step: Callable, chunks: Iterable[Chunk], write: Callable[[Results], None], meter: Meter) -> None:
    """Runs a step over the chunks that are left of a job, none if it is complete; writes and commits piece by piece."""
    results = streamed(step, ((chunk.data, chunk) for chunk in chunks), job.carry)
    carry, frames, latents, is_last = None, 0, 0, job.progress.is_complete

    def piece() -> Results:
        nonlocal carry, frames, latents, is_last
        frames = latents = 0
        for chunk, result, after in results:
            yield chunk, result
            meter.done(chunk.frames)
            carry, is_last = after, chunk.is_last
            frames, latents = frames + chunk.frames, latents + chunk.latents
            if is_last or latents >= PIECE_LATENTS + (job.progress.pieces == 0):
                return

    meter.already(job.progress.frames)
    while not is_last:
        write(piece())
        job.commit(carry, frames, latents, is_last)


def streamed(step: Callable, chunks: Iterable[tuple[np.ndarray, T]], carry: Any = None) -> Iterator[tuple[T, Any, Any]]:
    """Runs a step over arrays, each with something that stays with it: yields that, the result, and the carry."""
    waiting: deque[T] = deque()  # the stream reads one chunk ahead of its results

    def arrays() -> Iterator[np.ndarray]:
        for array, companion in chunks:
            waiting.append(companion)
            yield array

    results = Stream(step, arrays(), carry)
    for result in results:
        yield waiting.popleft(), result, results.carry


def cut_padded(items: Iterable[ArrayLike], size: int, is_start: bool) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yields `size` stacked items at a time, the first of a stream alone; how many they are; whether they are the last.

    The last item is repeated to fill the last chunk: a shape of its own would be compiled for it alone.
    """
    chunks = cut(items, size, first=1 if is_start else size)
    chunk = next(chunks, None)
    while chunk is not None:
        after, padding = next(chunks, None), 0 if is_start else size - len(chunk)
        yield np.concatenate([chunk, np.repeat(chunk[-1:], padding, axis=0)]), len(chunk), after is None
        chunk, is_start = after, False
