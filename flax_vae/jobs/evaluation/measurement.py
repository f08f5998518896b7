"""Measures reconstructions of clips, a chunk at a time: T frames, H W pixels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flax_vae.io.pixels import to_float, to_uint8
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.clip import Clip
from flax_vae.jobs.evaluation.instruments import Instruments
from flax_vae.jobs.evaluation.scores import ClipQuality, Evaluation, Failures, Sample, listed
from flax_vae.jobs.pieces import Chunk, streamed
from flax_vae.jobs.screen import Meter
from flax_vae.metrics.fvd import FRAMES, resized
from flax_vae.metrics.psnr import psnr
from flax_vae.runtime.cluster import allgather, process
from flax_vae.runtime.stream import Compiled

T = TypeVar("T")
MAX_PSNR = 100.0  # dB; that of equal frames is not finite
SAMPLES = 12  # most frames of a clip that are kept for the picture
SHOWN = 6  # frames in the picture, and the worst one


@dataclass
class Share:
    """What a process finds, by the index of a clip: scores, errors, frames to show; and the worst frame of all."""

    done: dict[int, ClipQuality] = field(default_factory=dict)
    failed: dict[int, tuple[Path, str]] = field(default_factory=dict)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    worst: list[tuple[float, int, Sample]] = field(default_factory=list)  # dB, the clip's index, the frame; or none


def measure_all(clips: Sequence[Clip], failed: Failures, instruments: Instruments, meter: Meter) -> Evaluation:
    """Measures clips; in a cluster every process does its share, and all return the same evaluation.

    `failed` are left out already. ValueError where all turn out to be damaged.
    """
    shares = allgather(measured(clips, instruments, meter))
    done = in_order(share.done for share in shares)
    failed = [*failed, *in_order(share.failed for share in shares)]
    if not done:
        raise ValueError("\n".join(["no clip can be read to its end", *listed(failed)]))
    samples = [sample for some in in_order(share.samples for share in shares) for sample in some]
    *_, worst = min((found for share in shares for found in share.worst), key=lambda found: found[:2])
    if all((sample.path, sample.number) != (worst.path, worst.number) for sample in samples):
        samples.append(worst)
    chunk, factor = clips[0].config.chunk_frames(instruments.latents), clips[0].config.temporal_factor
    return Evaluation(done, failed, samples, chunk, factor, instruments.features is not None)


def in_order(found: Iterable[dict[int, T]]) -> list[T]:
    """Joins what processes found, in the order of the clips."""
    return [value for _, value in sorted((pair for part in found for pair in part.items()), key=lambda pair: pair[0])]


def measured(clips: Sequence[Clip], instruments: Instruments, meter: Meter) -> Share:
    """Measures this process's share: every clip, or in a cluster of N every N-th one."""
    share, shown = Share(), dict(sharing(len(clips)))
    number, processes = process()
    for index in range(number, len(clips), processes):
        clip, measurement = clips[index], Measurement(clips[index], instruments)
        try:
            measurement.run(meter)
        except Unreadable as error:
            share.failed[index] = clip.path, str(error)
            continue
        share.done[index] = ClipQuality(clip, measurement.scores, measurement.windows)
        share.samples[index] = measurement.chosen(shown.get(index, 0))
        worst = [*share.worst, *((sample.psnr, index, sample) for sample in measurement.worst)]
        share.worst = [min(worst, key=lambda found: found[:2])]
    return share


def sharing(clips: int) -> Iterator[tuple[int, int]]:
    """Yields the indices of the clips of which frames are shown, evenly chosen, and how many of each."""
    few = min(clips, SHOWN)
    for n, index in enumerate(np.linspace(0, clips - 1, few).round().astype(int).tolist()):
        yield index, SHOWN // few + (n < SHOWN % few)


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
        """Keeps the scores of a chunk's frames that are not padding."""
        for name, values in scores.items():
            self.scores.setdefault(name, []).extend(np.asarray(values[0], float)[: chunk.frames].tolist())
        for before, after in zip(chunk.pixels if chunk.pixels is not None else (), video, strict=False):
            quality = min(psnr(before, after), MAX_PSNR)
            # copies, as a view would keep all frames of its chunk
            self.look(Sample(self.clip.path, len(self.scores["psnr"]), quality, before.copy(), after.copy()))
            self.scores["psnr"].append(quality)
            if self.instruments.features is not None:
                self.gather(self.instruments.features, before, after)

    def gather(self, features: Compiled, before: np.ndarray, after: np.ndarray) -> None:
        """Adds a frame to the window; computes the features of one that is full."""
        self._window.append((before, after))
        if len(self._window) == FRAMES:
            clips = (jnp.asarray(to_float(np.stack(frames)))[None] for frames in zip(*self._window, strict=True))
            one, two = (np.asarray(features(resized(clip), None)[0][0]) for clip in clips)
            self.windows.append((one, two))
            self._window = []

    def look(self, sample: Sample) -> None:
        """Keeps a frame if it is the worst so far, or a multiple of the spacing."""
        if not self.worst or sample.psnr < self.worst[0].psnr:
            self.worst = [sample]
        if sample.number % self._spacing == 0:
            self._samples.append(sample)
        if len(self._samples) > SAMPLES:
            self._spacing *= 2
            self._samples = [sample for sample in self._samples if sample.number % self._spacing == 0]

    def chosen(self, count: int) -> list[Sample]:
        """Returns `count` frames: the one in the middle, or evenly from the first to the last."""
        if count == 1:
            return [self._samples[len(self._samples) // 2]]
        indices = np.linspace(0, len(self._samples) - 1, min(count, len(self._samples))).round().astype(int)
        return [self._samples[index] for index in indices]


def readable(chunks: Iterable[Chunk]) -> Iterator[tuple[np.ndarray, Chunk]]:
    """Yields chunks behind their arrays; raises Unreadable for the errors of reading a clip."""
    try:
        yield from ((chunk.data, chunk) for chunk in chunks)
    except UNREADABLE as error:
        raise Unreadable(str(error)) from error
