"""Where decoded frames go: pieces of a video that are joined at the end, or an image; beside them what was lost.

T frames, H W pixels.
"""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vae.jobs.screen import note

if TYPE_CHECKING:
    from flax_vae.jobs.job import Job
    from flax_vae.jobs.pieces import Chunk

IMAGE, VIDEO, LOSS = ".png", ".mp4", ".npz"  # suffixes: of an image, of a video or a piece of it, of what was lost
SAMPLES = 64  # frames that are kept for the contact sheet, at most


class FramePieces:
    """Writes decoded frames (1, T, H, W, 3), piece by piece, for a `target` that is a video or an image."""

    def __init__(self, job: Job, target: Path, fps: Fraction, height: int, width: int):
        self.job, self.is_image = job, target.suffix.lower() == IMAGE
        self.fps, self.height, self.width = fps, height, width
        self._stack, self._writer, self._loss = contextlib.ExitStack(), None, Loss(job.progress.frames)

    def __enter__(self) -> FramePieces:
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._stack.__exit__(*exception)

    def add(self, result: Any, chunk: Chunk) -> None:
        """Writes the frames of a chunk that are no filling."""
        from flax_vae.io.pixels import to_uint8
        from flax_vae.io.video_writer import VideoWriter, write_image

        pixels = to_uint8(np.asarray(result[0], np.float32))[: chunk.frames]
        if self.is_image:
            write_image(self.job.piece(IMAGE), pixels[0])
        else:
            if self._writer is None:
                piece = VideoWriter(self.job.piece(VIDEO), self.fps, self.height, self.width)
                self._writer = self._stack.enter_context(piece)
            self._writer.write(pixels)
        if chunk.pixels is not None:
            self._loss.add(chunk.pixels, pixels)

    def finish(self, is_last: bool) -> None:
        """Makes the piece whole."""
        self._stack.close()
        self._writer = None
        self._loss.save(self.job.piece(LOSS))


class Loss:
    """What the frames of a piece have lost: the PSNR of each, and samples of them before and after."""

    def __init__(self, start: int):
        self._start = start
        self._quality: list[float] = []
        self._samples: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Compares uint8 frames (T, H, W, 3)."""
        from flax_vae.metrics.psnr import psnr

        for pair in zip(before, after, strict=True):
            number = self._start + len(self._quality)
            self._quality.append(psnr(*pair))
            if number % spacing(number + 1) == 0:
                self._samples.append((number, *pair))

    def save(self, path: Path) -> None:
        """Writes what has been added since the last piece, if anything."""
        from flax_vae.io.files import replacing

        if not self._quality:
            return
        numbers, before, after = zip(*self._samples, strict=True) if self._samples else ((), (), ())
        with replacing(path) as part:
            np.savez(part, quality=self._quality, numbers=numbers, before=before, after=after)
        self._start += len(self._quality)
        self._quality, self._samples = [], []


def spacing(frames: int) -> int:
    """Gives the power of two at which no more than `SAMPLES` of so many frames are kept."""
    return 1 << max((frames - 1) // SAMPLES, 0).bit_length()


def losses(job: Job) -> tuple[list[float], list[int], np.ndarray, np.ndarray]:
    """Gives, of all pieces, the PSNR of each frame, and numbers of evenly spaced frames, these before and after."""
    quality: list[float] = []
    kept: list[tuple[int, np.ndarray, np.ndarray]] = []
    step = spacing(job.progress.frames)
    for path in job.pieces(LOSS):
        with np.load(path) as file:
            quality += file["quality"].tolist()
            columns = zip(file["numbers"].tolist(), file["before"], file["after"], strict=True)
            kept += [sample for sample in columns if sample[0] % step == 0]
    numbers, before, after = zip(*kept, strict=True)
    return quality, list(numbers), np.stack(before), np.stack(after)


def assemble(job: Job, target: Path, fps: Fraction, sound: Path | None = None) -> None:
    """Makes the video or image of its pieces, with the sound of a file; says so where that cannot be had."""
    from flax_vae.io.video_join import join

    if target.suffix.lower() == IMAGE:
        if job.piece(IMAGE, 0).exists():  # or it has its name already, and was stopped after that
            os.replace(job.piece(IMAGE, 0), target)
        return
    whole = job.folder / f"whole{target.suffix}"  # not beside the target, where kill -9 would leave it for ever
    try:
        join(whole, job.pieces(VIDEO), fps, sound)
    except ValueError as error:
        if sound is None:
            raise
        note(f"the clip gets no sound: {error}")
        join(whole, job.pieces(VIDEO), fps)
    os.replace(whole, target)
