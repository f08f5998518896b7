"""Measures reconstructions of clips, a chunk at a time: T frames, H W pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flax_vae.io.pixels import to_float, to_uint8
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.clip import Clip
from flax_vae.jobs.evaluation.instruments import Instruments
from flax_vae.jobs.evaluation.scores import ClipQuality, Evaluation, Sample, listed
from flax_vae.jobs.pieces import Chunk, streamed
from flax_vae.jobs.screen import Meter
from flax_vae.metrics.fvd import FRAMES, resized
from flax_vae.metrics.psnr import psnr
from flax_vae.runtime.cluster import allgather, process
from flax_vae.runtime.stream import Compiled

T = TypeVar("T")
BEST_PSNR = 100.0  # dB; equal frames have no finite one
SAMPLES = 12  # frames of a clip that are kept for the picture, at most
SHOWN = 6  # frames in the picture, and the worst one


@dataclass
class Share:
    """What a process finds: clips and frames of them to show by their place in the list, and of all the worst frame."""

    done: dict[int, ClipQuality] = field(default_factory=dict)
    failed: dict[int, tuple[Path, str]] = field(default_factory=dict)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    worst: list[tuple[float, int, Sample]] = field(default_factory=list)

    def add(self, place: int, measurement: Measurement, shown: int) -> None:
        """Adds a clip that is measured, of which so many frames are shown."""
        self.done[place] = ClipQuality(measurement.clip, measurement.scores, measurement.windows)
        self.samples[place] = measurement.chosen(shown)
        worst = [(sample.psnr, place, sample) for sample in measurement.worst]
        self.worst = [min([*self.worst, *worst], key=lambda found: found[:2])]

    def __or__(self, other: Share) -> Share:
        worst = [min([*self.worst, *other.worst], key=lambda found: found[:2])] if self.worst or other.worst else []
        return Share(self.done | other.done, self.failed | other.failed, self.samples | other.samples, worst)


def measure_all(
    clips: Sequence[Clip], failed: Sequence[tuple[Path, str]], instruments: Instruments, meter: Meter
) -> Evaluation:
    """Measures clips, in a cluster every process its share, after which all have the same evaluation.

    `failed` are left out already. Raises ValueError where all turn out to be damaged.
    """
    found = reduce(or_, allgather(measured(clips, instruments, meter)))
    done, broken, shown = (in_order(part) for part in (found.done, found.failed, found.samples))
    failed = [*failed, *broken]
    if not done:
        raise ValueError("\n".join(["no clip can be read to its end", *listed(failed)]))
    samples = [sample for some in shown for sample in some]
    names = {(sample.path, sample.number) for sample in samples}
    samples += [sample for *_, sample in found.worst if (sample.path, sample.number) not in names]
    chunk, factor = clips[0].config.chunk_frames(instruments.latents), clips[0].config.temporal_factor
    return Evaluation(done, failed, samples, chunk, factor, instruments.features is not None)


def measured(clips: Sequence[Clip], instruments: Instruments, meter: Meter) -> Share:
    """Measures what this process has to measure: every clip, or in a cluster of N every N-th one."""
    share, shown = Share(), dict(sharing(len(clips)))
    number, every = process()
    for place in range(number, len(clips), every):
        measurement = Measurement(clips[place], instruments)
        try:
            measurement.run(meter)
        except Unreadable as error:
            share.failed[place] = clips[place].path, str(error)
            continue
        share.add(place, measurement, shown.get(place, 0))
    return share


def in_order(found: dict[int, T]) -> list[T]:
    """Gives what was found in the order of the clips."""
    return [found[place] for place in sorted(found)]


def sharing(clips: int) -> Iterator[tuple[int, int]]:
    """Yields the clips of which frames are shown, evenly chosen, and how many of each."""
    few = min(clips, SHOWN)
    for n, place in enumerate(np.linspace(0, clips - 1, few).round().astype(int).tolist()):
        yield place, SHOWN // few + (n < SHOWN % few)


class Unreadable(Exception):
    """A clip turns out to be damaged."""


class Measurement:
    """The scores of a clip as far as it is measured, and few frames, evenly spaced, whatever its length."""

    def __init__(self, clip: Clip, instruments: Instruments):
        self.clip, self.instruments = clip, instruments
        self.scores: dict[str, list[float]] = {"psnr": []}
        self.windows: list[tuple[np.ndarray, np.ndarray]] = []
        self.worst: list[Sample] = []
        self._window: list[tuple[np.ndarray, np.ndarray]] = []
        self._samples: list[Sample] = []
        self._spacing = 1

    def run(self, meter: Meter) -> None:
        """Measures all frames; Unreadable where the clip is damaged, whatever came before the damage."""
        chunks = readable(self.clip.chunks(self.instruments.latents))
        for chunk, (video, scores), _ in streamed(self.instruments.compare, chunks):
            self.add(chunk, to_uint8(np.asarray(video[0], np.float32)), scores)
            meter.done(chunk.frames)

    def add(self, chunk: Chunk, video: np.ndarray, scores: dict[str, Array]) -> None:
        """Keeps the scores of a chunk's frames, without those that fill it."""
        for name, values in scores.items():
            self.scores.setdefault(name, []).extend(np.asarray(values[0], float)[: chunk.frames].tolist())
        for before, after in zip(chunk.pixels if chunk.pixels is not None else (), video, strict=False):
            quality = min(psnr(before, after), BEST_PSNR)
            # copies, as a view would keep all frames of its chunk
            self.look(Sample(self.clip.path, len(self.scores["psnr"]), quality, before.copy(), after.copy()))
            self.scores["psnr"].append(quality)
            if self.instruments.features is not None:
                self.gather(self.instruments.features, before, after)

    def gather(self, features: Compiled, before: np.ndarray, after: np.ndarray) -> None:
        """Adds a frame to the window; of one that is full, keeps the features."""
        self._window.append((before, after))
        if len(self._window) == FRAMES:
            one, two = (
                resized(jnp.asarray(to_float(np.stack(frames)))[None]) for frames in zip(*self._window, strict=True)
            )
            self.windows.append((np.asarray(features(one, None)[0][0]), np.asarray(features(two, None)[0][0])))
            self._window = []

    def look(self, sample: Sample) -> None:
        """Keeps a frame if it is the worst so far, or its turn."""
        if not self.worst or sample.psnr < self.worst[0].psnr:
            self.worst = [sample]
        if sample.number % self._spacing == 0:
            self._samples.append(sample)
        if len(self._samples) > SAMPLES:
            self._spacing *= 2
            self._samples = [sample for sample in self._samples if sample.number % self._spacing == 0]

    def chosen(self, count: int) -> list[Sample]:
        """Gives so many frames: the one in the middle, or evenly from the first to the last."""
        if count == 1:
            return [self._samples[len(self._samples) // 2]]
        places = np.linspace(0, len(self._samples) - 1, min(count, len(self._samples))).round().astype(int)
        return [self._samples[place] for place in places]


def readable(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yields chunks; Unreadable in place of what reading a clip raises."""
    try:
        yield from chunks
    except UNREADABLE as error:
        raise Unreadable(str(error)) from error
