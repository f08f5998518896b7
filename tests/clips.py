"""Clips for tests, written with PyAV alone, so that reading is tested without our writer."""

from pathlib import Path
from typing import Any

import av
import numpy as np


def noise(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def encode(path, clip, codec="libx264", pix_fmt="yuv420p", prepare=lambda stream: None, times=None, **options):
    """Writes frames (T, H, W, 3), 25 a second or shown at these 25ths of a second; the options are the container's."""
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        prepare(stream)
        for index, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def with_options(gop, **options):
    """Returns what sets a group of pictures and options of the encoder on a stream; for `encode`."""

    def prepare(stream):
        stream.gop_size, stream.options = gop, {name.replace("_", "-"): str(value) for name, value in options.items()}

    return prepare


def remux(source, path, shift=0, **options):
    """Copies the packets of a clip to another container, shown `shift` frames later."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=options) as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.pts is not None and packet.dts is not None:
                ticks = round(shift / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                container.mux(packet)
    return path


def join(path, *parts):
    """Writes the bytes of files, one behind the other."""
    path.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    return path
