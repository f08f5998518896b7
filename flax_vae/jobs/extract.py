"""Encodes the clips of a data set, each to a file or folder of its own: short ones of one shape together."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.budget import batch_clips, chunk_latents
from flax_vae.jobs.clip import Clip, open_clip
from flax_vae.jobs.encode import encode_clip
from flax_vae.jobs.model import Model, check_stream, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import PIECE_LATENTS, Chunk
from flax_vae.jobs.screen import Meter, note, progress, table

if TYPE_CHECKING:
    from flax_vae.io.latents import About
    from flax_vae.io.manifest import Entry, Log
    from flax_vae.models.statistics import LatentStatistics

LATENTS = "latents"
MANIFEST, FAILED, STATISTICS = "manifest.jsonl", "failed.jsonl", "statistics.json"


def extract(source: Path, out: Path, weights: str, options: Options, part: tuple[int, int] = (1, 1)) -> None:
    """Encodes the K-th of every N clips of a folder or manifest; of the last part to end, finishes `out`."""
    from flax_vae.io.files import scratch
    from flax_vae.io.manifest import Log, read_entries

    number, parts = part
    config, entries = read_config(weights), read_entries(source)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it first")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder to write")
    logs = check_parts(out, parts)
    check_stream(options.mesh, config, ())

    def open_entry(path: Path) -> Clip:
        clip = open_clip(path, config, options.size, options.frames)
        check_stream(options.mesh, config, [(clip.height, clip.width)])
        return clip

    model = load(weights, options)
    settings = {"size": options.size, "frames": options.frames, **model.identity}
    check_settings(logs, settings)
    (out / LATENTS).mkdir(parents=True, exist_ok=True)
    own = logs[number - 1]
    with Log(own, settings) as log, scratch(own.with_name(f".{own.stem}")) as folder:
        mine = [entry for i, entry in enumerate(entries) if i % parts == number - 1]
        Extraction(out, model, options, log, folder).run(mine, open_entry)
        finish(source, out, entries, logs, folder)


class Extraction:
    """Encodes clips to files in OUT/latents, and logs what has become of each."""

    def __init__(self, out: Path, model: Model, options: Options, log: Log, scratch: Path):
        from flax_vae.runtime.stream import compiled

        self.out, self.model, self.options, self.log, self.scratch = out, model, options, log, scratch
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
                if clip.expected_latents is None or clip.expected_latents > PIECE_LATENTS + 1:
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
            latents = chunk_latents(self.step, clip.shape, clip.expected_latents, self.options.budget)
            later = latents if clip.expected_latents != 1 else None
            self._batches[shape] = latents, batch_clips(self.step, clip.shape, later, left, self.options.budget)
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
            encode_clip(clip, target, self.model, replace(self.options, resume=True), Meter())
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


def check_parts(out: Path, parts: int) -> list[Path]:
    """Returns the log of each part; ValueError where OUT was begun with another number of parts."""
    logs = [out / f"log-{k:05d}-of-{parts:05d}.jsonl" for k in range(1, parts + 1)]
    if others := sorted(path.name for path in set(out.glob("log-*.jsonl")) - set(logs)):
        raise ValueError(f"{out}: was begun with another number of parts ({others[0]}); write elsewhere, or as begun")
    return logs


def check_settings(logs: Sequence[Path], settings: Mapping[str, object]) -> None:
    """Raises ValueError where another part was begun otherwise; only the machine may be another."""
    from flax_vae.io.manifest import as_json, read_settings

    for log in logs:
        before = read_settings(log)
        if before and {**before, "device": None} != as_json({**settings, "device": None}):
            raise ValueError(f"{log}: was begun otherwise, with {json.dumps(before)}; write elsewhere, or as begun")


def finish(source: Path, out: Path, entries: Sequence[Entry], logs: Sequence[Path], folder: Path) -> None:
    """Writes the manifest, the list of failures and the statistics, once every clip is done or has failed."""
    from flax_vae.io.manifest import read_log, write_lines
    from flax_vae.models.statistics import LatentStatistics

    kinds = {str(entry.path): entry.kind for entry in entries}
    latents: dict[str, str] = {}
    errors: dict[str, str] = {}
    total = None
    for line in (line for log in logs for line in read_log(log)):
        path = line["path"]
        if "error" in line:
            errors[path] = line["error"]
        elif path in kinds and path not in latents:  # another part may have done it before the list of clips changed
            latents[path] = line["latents"]
            part = LatentStatistics.from_dict(line["statistics"])
            total = part if total is None else total + part
    if missing := kinds.keys() - latents.keys() - errors.keys():
        note(f"{len(missing)} of {len(kinds)} clips are other parts' to do; the last to end writes {out / STATISTICS}")
        return
    failed = [path for path in kinds if path not in latents]
    write_lines(folder / MANIFEST, ({kinds[path]: path, "latents": latents[path]} for path in kinds if path in latents))
    write_lines(folder / FAILED, ({kinds[path]: path, "error": errors[path]} for path in failed))
    rows = [("clips encoded", len(kinds) - len(failed)), ("clips that cannot be read", len(failed))]
    if total is not None:
        write_statistics(folder / STATISTICS, total)
        rows += [("first latent frames: mean, std over all channels", total.first.overall())]
        rows += [("later latent frames: mean, std over all channels", total.rest.overall())]
    for path in sorted(folder.iterdir()):
        os.replace(path, out / path.name)
    table(f"{source} to {out}", rows)
    for path in failed[:9]:
        note(f"left out: {errors[path]}")
    if len(failed) > 9:
        note(f"and {len(failed) - 9} more, in {out / FAILED}")


def write_statistics(path: Path, total: LatentStatistics) -> None:
    """Writes the mean and standard deviation of every channel, and the scaling that they make."""
    try:
        scaling = total.scaling().to_dict()
    except ValueError as error:
        note(str(error))
        scaling = None
    path.write_text(json.dumps({**total.summary(), "scaling": scaling}, indent=2) + "\n", encoding="utf-8")
