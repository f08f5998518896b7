"""Encodes the clips of a data set, each to a file or folder of its own: short ones of one shape together."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np

from flax_vae.io.files import scratch, to_json
from flax_vae.io.finite import computed_of
from flax_vae.io.latents import SUFFIX, Latents, write_latents
from flax_vae.io.manifest import Entry, Log, as_json, read_entries, read_log, read_settings, write_lines
from flax_vae.io.video.frame_times import join_times, uneven
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.budget import batch_clips, chunk_latents
from flax_vae.jobs.clip import Clip, check_reading, open_entry
from flax_vae.jobs.encode import about_latents, encode_clip
from flax_vae.jobs.job import folder_of
from flax_vae.jobs.model import Model, check_stream, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import PIECE_LATENTS, Chunk, streamed
from flax_vae.jobs.screen import Meter, first_few, note, progress, table
from flax_vae.jobs.sources import check_folder, chunks_of, naming
from flax_vae.models.statistics import LatentStatistics
from flax_vae.runtime.stream import compiled

LATENTS = "latents"
MANIFEST, FAILED, STATISTICS = "manifest.jsonl", "failed.jsonl", "statistics.json"


def extract(source: Path, out: Path, weights: str, options: Options, part: tuple[int, int] = (1, 1)) -> None:
    """Encodes the clips of a data set, and goes on with it where some are done; the last part to end finishes `out`.

    Args:
      source: a folder, a manifest or a clip.
      out: the folder to write.
      weights: a checkpoint.
      options: how to read and compute.
      part: (k, n) encodes the k-th of every n clips, counted from 1.

    Raises ValueError where no clip can be encoded.
    """
    number, parts = part
    config, entries = read_config(weights), read_entries(source)
    check_reading(config, options.size, options.frames)
    check_folder(out)
    logs = check_parts(out, parts)
    check_stream(options.mesh, config, ())
    if [entry.path for entry in entries] == [source.absolute()]:  # one clip, which is no data set that may lack some
        open_entry(entries[0].kind, source, config, options.size, options.frames)
    model = load(weights, options)
    settings = {"size": options.size, "frames": options.frames, **model.identity}
    check_settings(logs, settings)
    (out / LATENTS).mkdir(parents=True, exist_ok=True)
    own = logs[number - 1]
    with Log(own, settings) as log, scratch(own.with_name(f".{own.stem}")) as folder:
        Extraction(out, model, options, log, folder).run(entries[number - 1 :: parts])
        finish(source, out, entries, logs, folder)


class Extraction:
    """Encodes clips to files in OUT/latents, and logs what has become of each."""

    def __init__(self, out: Path, model: Model, options: Options, log: Log, scratch: Path):
        self.out, self.model, self.options, self.log, self.scratch = out, model, options, log, scratch
        self.step = compiled(model.vae.encode_chunk, model.mesh)
        self._sizes: dict[tuple[int, ...], tuple[int, int]] = {}

    def run(self, entries: Sequence[Entry]) -> None:
        """Encodes what is not done yet, short clips of one shape together."""
        done = {path for path, _, statistics, _ in outcomes(self.log.path) if statistics}
        left = [entry for entry in entries if str(entry.path) not in done]
        groups: dict[tuple[int, ...], list[tuple[Entry, Clip]]] = {}
        config = self.model.vae.config
        with progress("extracting", len(entries), "clips") as self._meter:
            self._meter.already(len(entries) - len(left))
            for i, entry in enumerate(left):
                try:
                    clip = open_entry(entry.kind, entry.path, config, self.options.size, self.options.frames)
                    check_stream(self.options.mesh, config, [(clip.height, clip.width)])
                except UNREADABLE as error:
                    self.add(entry, {"error": str(error)})
                    continue
                if clip.expected_latents is None or clip.expected_latents > PIECE_LATENTS + 1:
                    self.encode_long(entry, clip)
                    continue
                shape = (clip.height, clip.width, clip.expected_latents)
                group = groups.setdefault(shape, [])
                group.append((entry, clip))
                if len(group) == self.sizes(shape, clip, len(left) - i)[1]:
                    self.encode_together(groups.pop(shape), self._sizes[shape][0])
            for shape, group in groups.items():
                while group:  # by powers of two, so that few sizes of batch are compiled
                    count = 1 << (len(group).bit_length() - 1)
                    self.encode_together(group[:count], self._sizes[shape][0])
                    del group[:count]

    def sizes(self, shape: tuple[int, ...], clip: Clip, left: int) -> tuple[int, int]:
        """Returns the latents of a chunk and the clips of a batch, for clips of one shape, of which N are left."""
        if shape not in self._sizes:
            budget, whole = self.options.budget, clip.expected_latents
            latents = chunk_latents(self.step, self.model.mesh, clip.shape, whole, budget)
            clips = batch_clips(self.step, clip.shape, None if whole == 1 else latents, left, budget)
            self._sizes[shape] = latents, clips
        return self._sizes[shape]

    def encode_together(self, group: Sequence[tuple[Entry, Clip]], size: int) -> None:
        """Encodes clips as one batch, each to a file; one that turns out to be broken does not touch the others."""
        failures: dict[int, Exception] = {}
        parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in group]
        frames = [0] * len(group)
        times: list[list[Sequence[Fraction]]] = [[] for _ in group]

        def readable(i: int, clip: Clip) -> Iterator[Chunk]:
            try:
                yield from chunks_of(clip, size)
            except ValueError as error:
                failures[i] = error

        def batches() -> Iterator[tuple[np.ndarray, tuple[Chunk | None, ...]]]:
            for chunks in zip_longest(*(readable(i, clip) for i, (_, clip) in enumerate(group))):
                padding = np.zeros_like(next(chunk.data for chunk in chunks if chunk))  # after the end of a clip
                yield np.concatenate([chunk.data if chunk else padding for chunk in chunks]), chunks

        for chunks, posterior, _ in streamed(self.step, batches()):
            mean, logvar = (np.asarray(x, np.float32) for x in (posterior.mean, posterior.logvar))
            for i, chunk in enumerate(chunks):
                if chunk:
                    own = slice(i, i + 1), slice(0, chunk.latents)
                    parts[i].append((mean[own], logvar[own]))
                    frames[i] += chunk.frames
                    times[i].append(chunk.times)
        for i, (entry, clip) in enumerate(group):
            if i in failures:
                self.add(entry, {"error": str(failures[i])})
                continue
            mean, logvar = (np.concatenate(each, axis=1) for each in zip(*parts[i], strict=True))
            try:
                with naming(entry.path), computed_of(entry.path):
                    target = self.write(entry, clip, mean, logvar, frames[i], times[i])
            except ValueError as error:
                self.add(entry, {"error": str(error)})
                continue
            self.done(entry, target, clip, frames[i], LatentStatistics.of(mean, logvar))

    def write(
        self,
        entry: Entry,
        clip: Clip,
        mean: np.ndarray,
        logvar: np.ndarray,
        frames: int,
        times: Sequence[Sequence[Fraction]],
    ) -> Path:
        """Writes the latents of one clip to a file, which gets its name when it is complete."""
        target = self.target(entry, SUFFIX)
        whole = self.scratch / target.name
        kept = uneven(join_times(times), clip.fps)
        write_latents(whole, about_latents(clip, self.model), mean, logvar, frames, times=kept)
        try:
            os.replace(whole, target)
        finally:
            whole.unlink(missing_ok=True)
        return target

    def encode_long(self, entry: Entry, clip: Clip) -> None:
        """Encodes one clip to a folder of files, or goes on with it."""
        target = self.out / LATENTS / entry.name
        try:
            with naming(entry.path):
                encode_clip(clip, self.target(entry, ""), self.model, replace(self.options, resume=True), Meter())
        except ValueError as error:
            shutil.rmtree(folder_of(target), ignore_errors=True)
            self.add(entry, {"error": str(error)})
            return
        latents = Latents(target)
        parts = [LatentStatistics.of(shard.read("mean"), shard.read("logvar"), shard.start) for shard in latents.shards]
        self.done(entry, target, clip, latents.frames, sum(parts[1:], parts[0]))

    def target(self, entry: Entry, suffix: str) -> Path:
        """Returns the path of a clip's latents, in a folder that exists."""
        path = self.out / LATENTS / f"{entry.name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def done(self, entry: Entry, target: Path, clip: Clip, frames: int, statistics: LatentStatistics) -> None:
        """Logs a clip that is encoded."""
        line = {"latents": target.relative_to(self.out).as_posix(), "frames": frames}
        size = {"height": clip.height, "width": clip.width}
        self.add(entry, {**line, **size, "statistics": statistics.to_dict()})

    def add(self, entry: Entry, line: Mapping[str, object]) -> None:
        """Logs what has become of a clip, and counts it."""
        self.log.add({"kind": entry.kind, "path": str(entry.path), **line})
        self._meter.done(1)


def check_parts(out: Path, parts: int) -> list[Path]:
    """Returns the log of each part; ValueError where OUT was begun with another number of parts."""
    logs = [out / f"log-{k:05d}-of-{parts:05d}.jsonl" for k in range(1, parts + 1)]
    if others := sorted(path.name for path in set(out.glob("log-*.jsonl")) - set(logs)):
        raise ValueError(f"{out}: was begun with another number of parts ({others[0]}); write elsewhere, or as begun")
    return logs


def check_settings(logs: Sequence[Path], settings: Mapping[str, object]) -> None:
    """Raises ValueError where another part was begun with other settings; only the machine may differ."""
    for log in logs:
        before = read_settings(log)
        if before and {**before, "device": None} != as_json({**settings, "device": None}):
            raise ValueError(f"{log}: was begun otherwise, with {json.dumps(before)}; write elsewhere, or as begun")


def outcomes(log: Path) -> Iterator[tuple[str, str, LatentStatistics | None, str]]:
    """Yields what a log says of each clip: its path, its latents and their statistics, or an error instead."""
    for line in read_log(log):
        try:
            statistics = None if "error" in line else LatentStatistics.from_dict(line["statistics"])
            found = line["path"], line.get("latents", ""), statistics, line.get("error", "")
            if not all(isinstance(word, str) for word in (found[0], found[1], found[3])):
                raise ValueError("no text")
        except (KeyError, ValueError):
            raise ValueError(f"{log}: is damaged, it says of a clip {line!r:.99}; remove it to start anew") from None
        yield found


def finish(source: Path, out: Path, entries: Sequence[Entry], logs: Sequence[Path], folder: Path) -> None:
    """Writes the manifest, the list of failures and the statistics, once every clip is done or has failed."""
    kinds = {str(entry.path): entry.kind for entry in entries}
    latents: dict[str, str] = {}
    errors: dict[str, str] = {}
    total = None
    for path, held, statistics, error in (outcome for log in logs for outcome in outcomes(log)):
        if statistics is None:
            errors[path] = error
        elif path in kinds and path not in latents:  # another part may have done it before the list of clips changed
            latents[path] = held
            total = statistics if total is None else total + statistics
    if missing := kinds.keys() - latents.keys() - errors.keys():
        note(f"{len(missing)} of {len(kinds)} clips are other parts' to do; the last to end writes {out / STATISTICS}")
        return
    failed = [path for path in kinds if path not in latents]
    write_lines(folder / MANIFEST, ({kinds[path]: path, "latents": latents[path]} for path in kinds if path in latents))
    write_lines(folder / FAILED, ({kinds[path]: path, "error": errors[path]} for path in failed))
    rows = [("clips encoded", len(kinds) - len(failed)), ("clips left out", len(failed))]
    if total is not None:
        write_statistics(folder / STATISTICS, total)
        rows += [("first latent frames: mean, std over all channels", total.first.overall())]
        rows += [("later latent frames: mean, std over all channels", total.rest.overall())]
    for path in sorted(folder.iterdir()):
        os.replace(path, out / path.name)
    table(f"{source} to {out}", rows)
    reasons, where = [errors[path] for path in failed], f", in {out / FAILED}"
    if not latents:
        raise ValueError("\n".join([f"{source}: no clip can be encoded", *first_few(reasons, where)]))
    for line in first_few([f"left out: {reason}" for reason in reasons], where):
        note(line)


def write_statistics(path: Path, total: LatentStatistics) -> None:
    """Writes the mean and standard deviation of every channel, and the scaling that they make."""
    try:
        scaling = total.scaling().to_dict()
    except ValueError as error:
        note(str(error))
        scaling = None
    path.write_text(to_json({**total.summary(), "scaling": scaling}, indent=2) + "\n", encoding="utf-8")
