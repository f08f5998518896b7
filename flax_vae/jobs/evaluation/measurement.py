"""Measures reconstructions of clips, a chunk at a time: T frames, H W pixels."""

from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flax_vae.io.finite import NotFinite, computed_of
from flax_vae.io.pixels import to_float, to_uint8
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.clip import Clip
from flax_vae.jobs.evaluation.instruments import Instruments
from flax_vae.jobs.evaluation.scores import ClipQuality, Evaluation, Failure, Sample
from flax_vae.jobs.frames import spacing
from flax_vae.jobs.pieces import Chunk, streamed
from flax_vae.jobs.screen import Meter, first_few
from flax_vae.metrics.fvd import FRAMES, resized
from flax_vae.metrics.psnr import MAX_PSNR, psnr
from flax_vae.runtime.cluster import allgather, process
from flax_vae.runtime.stream import Compiled

SAMPLES = 12  # most frames of a clip that are kept for the picture
SHOWN = 6  # frames in the picture, and the worst one


def measure_all(clips: Sequence[Clip], failed: Sequence[Failure], instruments: Instruments, meter: Meter) -> Evaluation:
    """Measures clips; in a cluster every process does its share, and all return the same evaluation.

    `failed` are left out already. ValueError where all turn out to be damaged.
    """
    shares = allgather(measured(clips, instruments, meter))
    found = sorted((entry for share, _ in shares for entry in share.items()), key=lambda entry: entry[0])
    done = [each for _, each in found if isinstance(each, ClipQuality)]
    left_out = [*failed, *(each for _, each in found if not isinstance(each, ClipQuality))]
    if not done:
        raise ValueError("\n".join(["no clip can be read to its end", *first_few([error for _, error in left_out])]))
    samples = [sample for clip in done for sample in clip.samples]
    _, worst = min((found for _, worst in shares for found in worst), key=lambda found: (found[1].psnr, found[0]))
    if all((sample.path, sample.number) != (worst.path, worst.number) for sample in samples):
        samples.append(worst)
    chunk, factor = clips[0].config.chunk_frames(instruments.latents), clips[0].config.temporal_factor
    return Evaluation(done, left_out, samples, chunk, factor, instruments.features is not None)


def measured(
    clips: Sequence[Clip], instruments: Instruments, meter: Meter
) -> tuple[dict[int, ClipQuality | Failure], list[tuple[int, Sample]]]:
    """Measures this process's share: every clip, or in a cluster of N every N-th one.

    Returns what was found, by the index of the clip; and the worst frame of all, with its clip's index, if any.
    """
    found: dict[int, ClipQuality | Failure] = {}
    worst: list[tuple[int, Sample]] = []
    shown, (number, processes) = dict(sharing(len(clips))), process()
    for index in range(number, len(clips), processes):
        clip, measurement = clips[index], Measurement(clips[index], instruments)
        try:
            with computed_of(clip.path):
                measurement.run(meter)
        except (Unreadable, NotFinite) as error:
            found[index] = clip.path, str(error)
            continue
        samples = measurement.chosen(shown.get(index, 0))
        found[index] = ClipQuality(clip, measurement.scores, measurement.windows, samples)
        worst = [*worst, *((index, sample) for sample in measurement.worst)]
        worst = [min(worst, key=lambda found: (found[1].psnr, found[0]))]
    return found, worst


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
        """Keeps a frame if it is the worst so far, or evenly spaced among those before."""
        if not self.worst or sample.psnr < self.worst[0].psnr:
            self.worst = [sample]
        step = spacing(sample.number + 1, SAMPLES)
        self._samples = [each for each in [*self._samples, sample] if each.number % step == 0]

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
