"""Measures how good a model's reconstructions of clips are, a chunk at a time: T frames, H W pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flax_vae.cli.clip import Clip
from flax_vae.cli.evaluation import ClipQuality, Evaluation, Sample, listed
from flax_vae.cli.instruments import Instruments
from flax_vae.cli.run import Chunk, streamed
from flax_vae.cli.screen import Meter
from flax_vae.io.picture import psnr
from flax_vae.io.pixels import to_float, to_uint8
from flax_vae.io.video import UNREADABLE
from flax_vae.runtime.stream import Compiled
from flax_vae.train.i3d import FRAMES, resized

BEST_PSNR = 100.0  # dB; equal frames have no finite one
SAMPLES = 12  # frames of a clip that are kept for the picture, at most
SHOWN = 6  # frames in the picture, and the worst one


def evaluate(
    clips: Sequence[Clip], failed: Sequence[tuple[Path, str]], instruments: Instruments, meter: Meter
) -> Evaluation:
    """Measures clips; `failed` are left out already. Raises ValueError where all turn out to be damaged."""
    done: list[ClipQuality] = []
    failed = list(failed)
    samples: list[Sample] = []
    worst: list[Sample] = []
    shares = dict(sharing(len(clips)))
    for i, clip in enumerate(clips):
        measurement = Measurement(clip, instruments)
        try:
            measurement.run(meter)
        except Unreadable as error:
            failed.append((clip.path, str(error)))
            continue
        done.append(ClipQuality(clip, measurement.scores, measurement.windows))
        samples += measurement.chosen(shares.get(i, 0))
        worst = [min([*worst, *measurement.worst], key=lambda sample: sample.psnr)]
    if not done:
        raise ValueError("\n".join(["no clip can be read to its end", *listed(failed)]))
    shown = {(sample.path, sample.number) for sample in samples}
    samples += [sample for sample in worst if (sample.path, sample.number) not in shown]
    chunk, factor = instruments.latents * clips[0].factor, clips[0].factor
    return Evaluation(done, failed, samples, chunk, factor, instruments.features is not None)


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
            self.add(chunk, to_uint8(np.asarray(video[0])), scores)
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
