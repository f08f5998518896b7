"""Puts the tiles of a HEIC or AVIF still together."""

from typing import Any

import numpy as np

from flax_vae.io.video.heif import Grid
from flax_vae.io.video.upright import accurate


def composed(container: Any, grid: Grid) -> Any:
    """Decodes the tiles of a still; returns the picture as an RGB frame of PyAV. ValueError where a tile is missing."""
    import av

    places: dict[int, list[int]] = {}
    for place, tile in enumerate(grid.tiles):
        places.setdefault(tile, []).append(place)
    streams = [stream for stream in container.streams.video if stream.id in places]
    canvas, left = np.zeros((grid.height, grid.width, 3), np.uint8), set(range(len(grid.tiles)))
    for packet in container.demux(streams) if streams else ():
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ValueError("a tile is incomplete")
            if frame.height * grid.rows < grid.height or frame.width * grid.columns < grid.width:
                raise ValueError(f"tiles of {frame.height}x{frame.width} do not fill {grid.height}x{grid.width}")
            pixels = frame.reformat(format="rgb24", interpolation=accurate()).to_ndarray()
            for place in places[packet.stream.id]:
                top, left_edge = place // grid.columns * frame.height, place % grid.columns * frame.width
                part = canvas[top : top + frame.height, left_edge : left_edge + frame.width]
                part[:] = pixels[: part.shape[0], : part.shape[1]]
                left.discard(place)
    if left:
        raise ValueError(f"{len(left)} of {len(grid.tiles)} tiles are missing")
    return av.VideoFrame.from_ndarray(canvas, format="rgb24")
