"""Batches of clips and images, drawn at random and always the same for a seed: B batch, T frames, H W pixels, uint8.

A batch is determined by the seed and its number alone, whatever reads it: a run that goes on at batch n reads n first,
and any number of workers gives the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_vae.io.manifest import Entry, whole_lines
from flax_vae.io.video_reader import UNREADABLE, draw_frames
from flax_vae.train.config import ClipConfig

TRIES = 64  # broken clips in a row after which it is the data set that is broken
ENDLESS = 1 << 50  # clips; grain's own endless repetition is too long to be mixed


def batches(
    entries: Sequence[Entry],
    config: ClipConfig,
    seed: int,
    start: int = 0,
    broken: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[np.ndarray]:
    """Yields batches (B, T, H, W, 3) without end, from number `start` on; T is 1 for images.

    With a `share` (k, N) only the k-th of N equal parts of every batch is read, counted from 0: those of k = 0 to N - 1
    joined are the batch.

    Where there are no images, they are frames of the videos. A clip that cannot be read, or is too short, is replaced
    by another one and noted in the file `broken`, a line a clip, once a process. Raises ValueError where there is no
    video to draw from, and when `TRIES` clips in a row cannot be read.
    """
    import grain

    videos = [entry for entry in entries if entry.kind == "video"]
    images = [entry for entry in entries if entry.kind == "image"] or videos
    if not videos and config.images < 1:
        raise ValueError("there are images alone: give videos too, or train on images with --clips.images 1")

    def drawn(kind: Sequence[Entry], frames: int, batch: int, number: int):
        draw = Draw(kind, config, frames, broken)
        source = grain.MapDataset.source(list(kind)).seed(seed + number).shuffle()
        every = source.repeat(-(-ENDLESS // len(kind))).random_map(draw)
        whole = len(every) - len(every) % batch
        own = [every[row:whole:batch] for row in rows_of(batch, share)]
        return grain.experimental.ZipMapDataset(own).map(stacked)

    parts = [(drawn(videos, config.frames, config.batch, 0), 1 - config.images)] if config.images < 1 else []
    parts += [(drawn(images, 1, config.image_batch, 1), config.images)] if config.images > 0 else []
    datasets, weights = zip(*parts, strict=True)
    mixed = grain.MapDataset.mix(datasets, weights)[start:]
    threads = 0 if config.workers else readers(config)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    ordered = mixed.to_iter_dataset(options)
    if config.workers:
        mark_flags_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
        ordered = ordered.mp_prefetch(workers, worker_init_fn=mark_flags_as_parsed)
    return iter(ordered)


def stacked(rows: Any) -> np.ndarray:
    """Gives a batch of its clips."""
    return np.stack(rows)


def rows_of(batch: int, share: tuple[int, int]) -> range:
    """Gives the rows of a batch that are the k-th of N equal parts, from 0; ValueError where N does not divide it."""
    number, parts = share
    if batch % parts:
        raise ValueError(f"{parts} processes cannot share {batch} clips or images of a batch: expected a multiple")
    return range(number * batch // parts, (number + 1) * batch // parts)


def readers(config: ClipConfig) -> int:
    """Counts what reads at a time: processes, or else threads."""
    return config.workers or max(os.cpu_count() or 1, 2)


def mark_flags_as_parsed(*_: Any) -> None:
    """Lets grain read its own settings, which it takes for a command line's."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class Draw:
    """Draws frames of a clip: from a random moment on, at a random place, mirrored every second time."""

    def __init__(self, entries: Sequence[Entry], config: ClipConfig, frames: int, broken: Path | None):
        self.entries, self.config, self.frames, self.broken = entries, config, frames, broken
        noted = whole_lines(broken) if broken else ()
        self._noted = {next(iter(json.loads(line).values())) for line in noted}

    def __call__(self, entry: Entry, rng: np.random.Generator) -> np.ndarray:
        for _ in range(TRIES):
            try:
                return self._drawn(entry.path, rng)
            except UNREADABLE as error:
                self._note(entry, error)
                entry = self.entries[int(rng.integers(len(self.entries)))]
        raise ValueError(f"{TRIES} clips in a row cannot be read; the last one: {entry.path}")

    def _drawn(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        moment, down, across, mirrored, zoomed = rng.random(5)
        size, zoom = (self.config.size, self.config.size), self.config.zoom**zoomed
        frames = draw_frames(path, self.frames, size, moment, (down, across), self.config.fps, zoom)
        return frames[:, :, ::-1] if self.config.flip and mirrored < 0.5 else frames

    def _note(self, entry: Entry, error: Exception) -> None:
        if self.broken is None or str(entry.path) in self._noted:
            return
        self._noted.add(str(entry.path))
        line = json.dumps({entry.kind: str(entry.path), "error": str(error)}) + "\n"
        with open(self.broken, "ab", buffering=0) as file:  # in one piece: several processes write it
            file.write(line.encode())
