"""Decoded frames as files: pieces of a video that are joined at the end, or an image; their times and loss beside them.

T frames, H W pixels.
"""

import os
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import numpy as np

from flax_vae.io.files import replacing
from flax_vae.io.pixels import to_uint8
from flax_vae.io.video.frame_times import from_text, join_times, to_text, uneven
from flax_vae.io.video_join import join
from flax_vae.io.video_writer import VideoWriter, write_image, written_rate
from flax_vae.jobs.job import Job
from flax_vae.jobs.pieces import Results
from flax_vae.jobs.screen import note
from flax_vae.metrics.psnr import psnr

IMAGE, VIDEO, TIMES, LOSS = ".png", ".mp4", ".json", ".npz"  # of an image, a video or a piece of it, what is beside it
SAMPLES = 64  # most frames that are kept for the contact sheet


def write_piece(job: Job, fps: Fraction, height: int, width: int, results: Results) -> None:
    """Writes the decoded frames (1, T, H, W, 3) of a piece, without padding, to a video or image; their times, loss."""
    is_image, loss, times = job.target.suffix.lower() == IMAGE, Loss(job.progress.frames), []
    with nullcontext() if is_image else VideoWriter(job.piece(VIDEO), fps, height, width) as writer:
        for chunk, decoded in results:
            pixels = to_uint8(np.asarray(decoded[0], np.float32))[: chunk.frames]
            times.append(chunk.times)
            if writer is None:
                write_image(job.piece(IMAGE), pixels[0])
            else:
                writer.write(pixels)
            if chunk.pixels is not None:
                loss.add(chunk.pixels, pixels)
    job.piece(TIMES).write_text(to_text(join_times(times)))
    loss.save(job.piece(LOSS))


class Loss:
    """What the frames of a piece have lost: the PSNR of each, and samples of them before and after."""

    def __init__(self, start: int):
        self._start = start
        self._quality: list[float] = []
        self._samples: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Compares uint8 frames (T, H, W, 3)."""
        for pair in zip(before, after, strict=True):
            number = self._start + len(self._quality)
            self._quality.append(psnr(*pair))
            if number % spacing(number + 1, SAMPLES) == 0:
                self._samples.append((number, *pair))

    def save(self, path: Path) -> None:
        """Writes what was added, if anything."""
        if self._quality:
            numbers, before, after = zip(*self._samples, strict=True) if self._samples else ((), (), ())
            with replacing(path) as part:
                np.savez(part, quality=self._quality, numbers=numbers, before=before, after=after)


def spacing(frames: int, samples: int) -> int:
    """Returns the smallest power of two that has at most `samples` multiples below `frames`."""
    return 1 << max((frames - 1) // samples, 0).bit_length()


def losses(job: Job) -> tuple[list[float], list[int], np.ndarray, np.ndarray]:
    """Returns the PSNR of every frame in dB, the numbers of evenly spaced frames, and these before and after."""
    quality: list[float] = []
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    step = spacing(job.progress.frames, SAMPLES)
    for path in job.pieces(LOSS):
        with np.load(path) as file:
            quality += file["quality"].tolist()
            columns = zip(file["numbers"].tolist(), file["before"], file["after"], strict=True)
            kept += [sample for sample in columns if sample[0] % step == 0]
    numbers, before, after = zip(*kept, strict=True)
    return quality, list(numbers), np.stack(before), np.stack(after)


def assemble(job: Job, fps: Fraction, sound: Path | None = None) -> None:
    """Makes the target of its pieces, with the sound of a file; notes why where that cannot be read."""
    if job.target.suffix.lower() == IMAGE:
        if job.piece(IMAGE, 0).exists():  # otherwise it was stopped after the rename
            os.replace(job.piece(IMAGE, 0), job.target)
        return
    whole = job.folder / f"whole{job.target.suffix}"  # not beside the target, where kill -9 would leave it for ever
    times = join_times([from_text(path.read_text()) for path in job.pieces(TIMES)])
    kept = uneven(times, written_rate(fps))
    if kept:
        note(f"{job.target}: each frame keeps its time, as not all follow at {fps} a second")
    try:
        join(whole, job.pieces(VIDEO), fps, sound, kept)
    except ValueError as error:
        if sound is None:
            raise
        note(f"the clip gets no sound: {error}")
        join(whole, job.pieces(VIDEO), fps, times=kept)
    os.replace(whole, job.target)
