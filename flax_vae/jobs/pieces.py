"""Runs a stream from chunks to pieces: files that are whole, after each of which work can be gone on with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from flax_vae.jobs.job import Job
    from flax_vae.jobs.screen import Meter

PIECE_LATENTS = 16  # of a piece, but for one more in the first; chunks are a power of two up to this
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """What a step is given: the batch, the frames and latents in it that are no filling, and the pixels it is from."""

    data: np.ndarray
    frames: int
    latents: int
    is_last: bool
    pixels: np.ndarray | None = None


class Pieces(Protocol):
    """Where results go; `finish` makes a whole file of those since the last one."""

    def add(self, result: Any, chunk: Chunk) -> None: ...

    def finish(self, is_last: bool) -> None: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception) -> bool | None: ...


def run(job: Job, step: Callable, chunks: Iterable[Chunk], pieces: Pieces, meter: Meter) -> None:
    """Puts chunks, those after what the job has done, through a step and commits every piece."""
    frames = latents = 0
    with pieces:
        for chunk, result, carry in streamed(step, chunks, job.carry):
            pieces.add(result, chunk)
            meter.done(chunk.frames)
            frames, latents = frames + chunk.frames, latents + chunk.latents
            if chunk.is_last or latents >= PIECE_LATENTS + (job.progress.pieces == 0):
                pieces.finish(chunk.is_last)
                job.commit(carry, frames, latents, chunk.is_last)
                frames = latents = 0


def streamed(step: Callable, chunks: Iterable[Chunk], carry: Any = None) -> Iterator[tuple[Chunk, Any, Any]]:
    """Puts chunks through a step, and yields each with its result and the carry after it."""
    from flax_vae.runtime.stream import Stream

    waiting: deque[Chunk] = deque()  # the stream reads ahead of the results that it gives

    def data() -> Iterator[np.ndarray]:
        for chunk in chunks:
            waiting.append(chunk)
            yield chunk.data

    results = Stream(step, data(), carry)
    for result in results:
        yield waiting.popleft(), result, results.carry


def marked(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yields every item with whether it is the last one."""
    before: list[T] = []
    for item in items:
        yield from ((ready, False) for ready in before)
        before = [item]
    yield from ((ready, True) for ready in before)
