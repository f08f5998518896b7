"""`flax-vae reconstruct`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.cli.options import (
    COMPUTING,
    READING,
    Clip,
    Computing,
    LossyTiles,
    MeasureTiles,
    Reading,
    Resume,
    Video,
    Weights,
    options,
)

if TYPE_CHECKING:
    from flax_vae.jobs.reconstruct import Reconstruction


def reconstruct(
    video: Video,
    out: Clip,
    weights: Weights,
    reading: Reading = READING,
    computing: Computing = COMPUTING,
    resume: Resume = False,
    lossy_tiles: LossyTiles = False,
    measure_tiles: MeasureTiles = False,
) -> None:
    """Encodes and decodes a clip of any length, a chunk at a time, and shows what is lost on the way.

    Writes the clip, with its sound, to OUT.mp4 and a contact sheet (input, reconstruction, difference) to
    OUT_sheet.png beside it. Prints the PSNR, taken from the 8-bit frames before H.264 compresses them: about 30 dB and
    more is close, 10 dB noise. A clip whose frames make no whole latents is filled by repeating its last frame; the
    repeats are cut off again.

    Example:
      flax-vae reconstruct clip.mp4 again.mp4 --weights my_vae --size 256 --frames 65
    """
    from flax_vae.jobs import reconstruct as job

    asked = options(reading, computing, resume, lossy_tiles)
    report(video, out, job.reconstruct(video, out, weights, asked, measure_tiles))


def report(video: Path, out: Path, found: Reconstruction) -> None:
    """Prints what was lost, and where to look."""
    from flax_vae.jobs.reconstruct import sheet_of
    from flax_vae.jobs.screen import counted, table

    if not (quality := found.quality):
        return
    worst = int(np.argmin(quality))
    rows = [
        ("PSNR, mean of the frames", f"{math.fsum(quality) / len(quality):.2f} dB"),
        ("PSNR, worst frame", f"{quality[worst]:.2f} dB (frame {worst})"),
        *found.tiles,
        ("speed", found.meter.pace()),
        ("written", str(out)),
        *([("contact sheet", str(sheet_of(out)))] if not video.is_dir() else []),
    ]
    table(f"{video}: {counted(len(quality))}", rows)
