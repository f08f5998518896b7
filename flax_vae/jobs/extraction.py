"""Encodes the clips of a data set, each to a file or folder of its own: short ones of one shape together."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.cli.encode import encode_clip
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.budget import batch_clips, chunk_latents
from flax_vae.jobs.clip import Clip
from flax_vae.jobs.model import Model
from flax_vae.jobs.pieces import PIECE, Chunk
from flax_vae.jobs.screen import Meter, progress

if TYPE_CHECKING:
    from flax_vae.io.latents import About
    from flax_vae.io.manifest import Entry, Log
    from flax_vae.models.statistics import LatentStatistics

LATENTS = "latents"


class Extraction:
    """Encodes clips to files in OUT/latents, and logs what has become of each."""

    def __init__(self, out: Path, model: Model, budget: int | None, log: Log, scratch: Path):
        from flax_vae.runtime.stream import compiled

        self.out, self.model, self.budget, self.log, self.scratch = out, model, budget, log, scratch
        self.step = compiled(model.vae.encode_chunk, model.mesh)
        self._batches: dict[tuple[int, ...], tuple[int, int]] = {}

    def run(self, entries: Sequence[Entry], open_entry: Callable[[Path], Clip]) -> None:
        """Encodes what is not done yet, short clips of one shape together."""
        from flax_vae.io.manifest import read_log

        done = {line["path"] for line in read_log(self.log.path) if "latents" in line}
        left = [entry for entry in entries if str(entry.path) not in done]
        groups: dict[tuple[int, ...], list[Row]] = {}
        with progress("extracting", len(entries), "clips") as self._meter:
            self._meter.already(len(entries) - len(left))
            for i, entry in enumerate(left):
                try:
                    clip = open_entry(entry.path)
                except UNREADABLE as error:
                    self.fail(entry, error)
                    continue
                if clip.expected_latents is None or clip.expected_latents > PIECE + 1:
                    self.encode_long(entry, clip)
                    continue
                shape = (clip.height, clip.width, clip.expected_latents)
                latents, most = self.batch(shape, clip, len(left) - i)
                group = groups.setdefault(shape, [])
                group.append(Row(entry, clip, latents))
                if len(group) == most:
                    self.encode_together(groups.pop(shape))
            for group in groups.values():
                while group:  # by powers of two, so that few sizes of batch are compiled
                    most = 1 << (len(group).bit_length() - 1)
                    self.encode_together(group[:most])
                    del group[:most]

    def batch(self, shape: tuple[int, ...], clip: Clip, left: int) -> tuple[int, int]:
        """Gives latents of a chunk and clips of a batch, for clips of one shape."""
        if shape not in self._batches:
            latents = chunk_latents(self.step, clip.shape, clip.expected_latents, self.budget)
            later = latents if clip.expected_latents != 1 else None
            self._batches[shape] = latents, batch_clips(self.step, clip.shape, later, left, self.budget)
        return self._batches[shape]

    def encode_together(self, rows: list[Row]) -> None:
        """Encodes clips side by side, each to a file; one that turns out to be broken does not touch the others."""
        from flax_vae.io.latents import SUFFIX, write_latents
        from flax_vae.models.statistics import LatentStatistics
        from flax_vae.runtime.stream import Stream

        def batches() -> Iterator[np.ndarray]:
            while not all(row.is_over for row in rows):
                yield np.concatenate([row.read() for row in rows])

        for posterior in Stream(self.step, batches()):
            mean, logvar = (np.asarray(x, np.float32) for x in (posterior.mean, posterior.logvar))
            for i, row in enumerate(rows):
                row.take(mean[i : i + 1], logvar[i : i + 1])
        for row in rows:
            if row.failure is not None:
                self.fail(row.entry, row.failure)
                continue
            mean, logvar = (np.concatenate(parts, axis=1) for parts in zip(*row.parts, strict=True))
            target = self.target(row.entry, SUFFIX)
            whole = self.scratch / target.name
            write_latents(whole, self.about(row.clip), mean, logvar, row.frames)
            os.replace(whole, target)
            self.done(row.entry, target, row.clip, row.frames, LatentStatistics.of(mean, logvar))

    def encode_long(self, entry: Entry, clip: Clip) -> None:
        """Encodes one clip to a folder of files, or goes on with it."""
        from flax_vae.io.latents import Latents
        from flax_vae.jobs.job import folder_of
        from flax_vae.models.statistics import LatentStatistics

        target = self.target(entry, "")
        try:
            encode_clip(clip, target, self.model, None, self.budget, True, Meter())
        except ValueError as error:
            shutil.rmtree(folder_of(target), ignore_errors=True)
            self.fail(entry, error)
            return
        latents = Latents(target)
        parts = [LatentStatistics.of(shard.read("mean"), shard.read("logvar"), shard.start) for shard in latents.shards]
        self.done(entry, target, clip, latents.frames, sum(parts[1:], parts[0]))

    def about(self, clip: Clip) -> About:
        """Gives what the latents of a clip say of it."""
        from flax_vae.io.latents import About

        return About(clip.height, clip.width, clip.fps, self.model.config_hash, self.model.weights)

    def target(self, entry: Entry, suffix: str) -> Path:
        """Gives the path of a clip's latents, in a folder that is there."""
        path = self.out / LATENTS / f"{entry.name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def done(self, entry: Entry, target: Path, clip: Clip, frames: int, statistics: LatentStatistics) -> None:
        """Logs a clip that is encoded."""
        about = {"frames": frames, "height": clip.height, "width": clip.width}
        line = {
            "kind": entry.kind,
            "path": str(entry.path),
            "latents": target.relative_to(self.out).as_posix(),
            **about,
        }
        self.log.add({**line, "statistics": statistics.to_dict()})
        self._meter.done(1)

    def fail(self, entry: Entry, error: Exception) -> None:
        """Logs a clip that cannot be read."""
        self.log.add({"kind": entry.kind, "path": str(entry.path), "error": str(error)})
        self._meter.done(1)


class Row:
    """A clip in a batch: its chunks, and the latents that come of them."""

    def __init__(self, entry: Entry, clip: Clip, latents: int):
        self.entry, self.clip = entry, clip
        self.frames, self.is_over, self.failure = 0, False, None
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._latents, self._chunks = latents, clip.chunks(latents)
        self._shape = clip.shape(0)
        self._waiting: deque[Chunk | None] = deque()  # read ahead of their results

    def read(self) -> np.ndarray:
        """Gives the next chunk, or zeros after the end of the clip, or its first damage."""
        data, self._shape = np.zeros(self._shape, np.float32), self.clip.shape(self._latents)
        chunk = None
        if not self.is_over:
            try:
                chunk = next(self._chunks)
                data, self.is_over = chunk.data, chunk.is_last
            except UNREADABLE as error:
                self.failure, self.is_over = error, True
        self._waiting.append(chunk)
        return data

    def take(self, mean: np.ndarray, logvar: np.ndarray) -> None:
        """Keeps the latents of the chunk that was read first of those not taken yet."""
        if (chunk := self._waiting.popleft()) is not None:
            self.parts.append((mean[:, : chunk.latents], logvar[:, : chunk.latents]))
            self.frames += chunk.frames
