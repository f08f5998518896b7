"""`flax-vae reconstruct`."""

import math
from typing import Annotated

from flax_vae.cli.options import CODING, Clip, Coding, Flag, Video, Weights, flag_help
from flax_vae.jobs.screen import counted, table

MeasureTiles = Annotated[
    Flag,
    flag_help(
        "with --lossy-tiles: print the PSNR of the first frames in tiles against those without, which takes the "
        "memory that tiles save"
    ),
]


def reconstruct(
    video: Video, out: Clip, weights: Weights, options: Coding = CODING, measure_tiles: MeasureTiles = False
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

    found = job.reconstruct(video, out, weights, options, measure_tiles)
    if quality := found.quality:
        worst = min(range(len(quality)), key=quality.__getitem__)
        rows = [
            ("PSNR, mean of the frames", f"{math.fsum(quality) / len(quality):.2f} dB"),
            ("PSNR, worst frame", f"{quality[worst]:.2f} dB (frame {worst})"),
            *found.tiles,
            ("speed", found.meter.pace()),
            ("written", str(out)),
            *([("contact sheet", str(job.sheet_of(out)))] if not video.is_dir() else []),
        ]
        table(f"{video}: {counted(len(quality))}", rows)
    found.attempts.check()
