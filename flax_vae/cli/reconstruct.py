"""`flax-vae reconstruct`."""

from __future__ import annotations

import itertools
import math

import numpy as np

from flax_vae.cli.clip import check_target, open_clip
from flax_vae.cli.model import load, read_config
from flax_vae.cli.options import Clip, Frames, Size, Video, Weights
from flax_vae.cli.screen import counted, progress, table

SAMPLES = 128  # frames kept for the contact sheet, at most


def reconstruct(video: Video, out: Clip, weights: Weights, size: Size = None, frames: Frames = None) -> None:
    """Encodes and decodes a clip of any length, a chunk at a time, and shows what is lost on the way.

    Writes the clip to OUT.mp4 and a contact sheet (input, reconstruction, difference) to OUT.png beside it. Prints
    the PSNR, taken from the 8-bit frames before H.264 compresses them: about 30 dB and more is close, 10 dB noise.
    A clip whose frames are not 8k + 1 is filled by repeating its last frame; the repeats are cut off again.

    Example:
      flax-vae reconstruct clip.mp4 again.mp4 --weights my_vae --size 256 --frames 65
    """
    import matplotlib  # noqa: F401  # needed last of all, so a missing one would be noticed too late

    from flax_vae.io.picture import contact_sheet, pooled_psnr, psnr
    from flax_vae.io.pixels import to_float, to_uint8
    from flax_vae.io.writer import SUFFIXES, VideoWriter

    sheet = out.with_suffix(".png")
    check_target(out, SUFFIXES, video)
    check_target(sheet, [".png"], video)
    config = read_config(weights)
    clip = open_clip(video, config, size, frames)
    writer = VideoWriter(out, clip.fps, clip.height, clip.width)
    vae = load(weights)

    from flax_vae.runtime.stream import compiled, stream

    inputs, outputs, quality = Samples(), Samples(), []
    with progress("reconstructing", clip.expected) as meter, writer:
        originals, chunks = itertools.tee(clip.chunks())
        posteriors = stream(compiled(vae.encode_chunk), (to_float(chunk)[None] for chunk, _ in chunks))
        videos = stream(compiled(vae.decode_chunk), (posterior.mean for posterior in posteriors))
        for (chunk, length), decoded in zip(originals, videos, strict=True):
            again = to_uint8(np.asarray(decoded[0]))
            for before, after in zip(chunk[:length], again[:length], strict=True):
                writer.write(after)
                quality.append(psnr(before, after))
                inputs.add(before)
                outputs.add(after)
            meter.done(length)
        contact_sheet(sheet, inputs.frames, outputs.frames, video.name, inputs.numbers, pooled_psnr(quality))
    clip.report(meter.frames)
    worst = int(np.argmin(quality))
    rows = [
        ("PSNR, mean of the frames", f"{math.fsum(quality) / len(quality):.2f} dB"),
        ("PSNR, worst frame", f"{quality[worst]:.2f} dB (frame {worst})"),
        ("speed", meter.pace()),
        ("clip", str(out)),
        ("contact sheet", str(sheet)),
    ]
    table(f"{video}: {counted(meter.frames)} of {clip.height}x{clip.width}", rows)


class Samples:
    """Keeps evenly spaced frames of a clip, at most 128, however long it becomes."""

    def __init__(self):
        self.frames: list[np.ndarray] = []
        self.stride, self._seen = 1, 0

    @property
    def numbers(self) -> range:
        """Which frames of the clip are kept, counted from 0."""
        return range(0, len(self.frames) * self.stride, self.stride)

    def add(self, frame: np.ndarray) -> None:
        """Looks at the next frame and keeps a copy where its turn has come."""
        if self._seen % self.stride == 0:
            self.frames.append(frame.copy())
        self._seen += 1
        if len(self.frames) > SAMPLES:
            self.frames, self.stride = self.frames[::2], 2 * self.stride
