"""Batches of clips and images, drawn at random: B batch, T frames, H W pixels, uint8.

A batch is determined by the seed and its number alone: a run that continues at batch n reads n first, and any number of
workers reads the same.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from flax_vae.io.manifest import Entry, whole_lines
from flax_vae.io.video.draw import draw_frames
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.train.config import ClipConfig

MAX_TRIES = 64  # broken clips in a row after which it is the data set that is broken
ENDLESS_CLIPS = 1 << 50  # grain's own endless repetition is too long to be mixed


def batches(
    entries: Sequence[Entry],
    config: ClipConfig,
    seed: int,
    start: int = 0,
    broken: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[np.ndarray]:
    """Yields batches (B, T, H, W, 3) without end; T is 1 for images, which are frames of videos where there are none.

    `start` is the number of the first batch. The file `broken` lists, a line a clip, what cannot be read or is too
    short, and is replaced by another clip. With the share (k, N) the k-th of N equal parts of every batch is read,
    counted from 0. Raises ValueError where there is no video, N does not divide a batch, or MAX_TRIES clips in a row
    cannot be read.
    """
    videos = [entry for entry in entries if entry.kind == "video"]
    images = [entry for entry in entries if entry.kind == "image"] or videos
    if not videos and config.images < 1:
        raise ValueError("there are images alone: give videos too, or train on images with --clips.images 1")

    def drawn(kind: Sequence[Entry], frames: int, batch: int, number: int):
        draw = Draw(kind, config, frames, broken)
        source = grain.MapDataset.source(list(kind)).seed(seed + number).shuffle()
        clips = source.repeat(-(-ENDLESS_CLIPS // len(kind))).random_map(draw)
        whole = len(clips) - len(clips) % batch
        rows: Any = grain.experimental.ZipMapDataset([clips[row:whole:batch] for row in rows_of(batch, share)])
        return rows.map(np.stack)

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


def rows_of(batch: int, share: tuple[int, int]) -> range:
    """Returns the rows of the k-th of N equal parts of a batch; ValueError where N does not divide it."""
    number, parts = share
    if batch % parts:
        raise ValueError(f"{parts} processes cannot share {batch} clips or images of a batch: expected a multiple")
    return range(number * batch // parts, (number + 1) * batch // parts)


def readers(config: ClipConfig) -> int:
    """Returns the number of processes that read, or of threads where there are none."""
    return config.workers or max(os.cpu_count() or 1, 2)


def mark_flags_as_parsed(*_: Any) -> None:
    """Lets grain read its absl flags, which raise an error until a command line is parsed."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class Draw:
    """Draws frames of a clip: from a random moment on, in a random crop, mirrored every second time."""

    def __init__(self, entries: Sequence[Entry], config: ClipConfig, frames: int, broken: Path | None):
        self.entries, self.config, self.frames, self.broken = entries, config, frames, broken
        noted = whole_lines(broken) if broken else ()
        self._noted = {next(iter(json.loads(line).values())) for line in noted}

    def __call__(self, entry: Entry, rng: np.random.Generator) -> np.ndarray:
        for _ in range(MAX_TRIES):
            try:
                return self._drawn(entry.path, rng)
            except UNREADABLE as error:
                self._note(entry, error)
                entry = self.entries[int(rng.integers(len(self.entries)))]
        raise ValueError(f"{MAX_TRIES} clips in a row cannot be read; the last one: {entry.path}")

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
        with open(self.broken, "ab", buffering=0) as file:  # in one write: several processes append
            file.write(line.encode())
