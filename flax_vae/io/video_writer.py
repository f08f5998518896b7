"""Writes video files, frame by frame and without sound, and images, through PyAV (FFmpeg): H W pixels, always RGB."""

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from flax_vae.io.files import PathLike, check_target, replacing

SUFFIXES = (".mp4", ".mkv", ".mov")
MIN_FPS, MAX_FPS = Fraction(1, 1000), Fraction(1000)
# The same frames must give the same bytes. With x264's macroblock tree one run in some dozens gives others, as if it
# read uninitialised memory; and x264 splits its work by the number of threads, which must not be the machine's.
DETERMINISTIC = {"mbtree": "0", "threads": "4"}
# BT.709, limited range. A chroma sample lies on the left one of the two luma samples beside it, as H.264 means where a
# file says nothing; swscale by itself computes it for the middle, and players then show colours half a pixel aside.
YUV420P = (
    "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp:out_color_matrix=bt709:out_range=tv"
    ":out_h_chr_pos=0:out_v_chr_pos=128"
)


class VideoWriter:
    """Writes uint8 RGB frames to an H.264 file that takes its name, or replaces an older one, only when complete.

    `with VideoWriter(path, fps, height, width) as writer: writer.write(frames)`

    Args:
      path: of a file .mp4, .mkv or .mov.
      fps: frames per second.
      height, width: size in pixels.
      lossless: RGB: exact, any size, larger, played by few; otherwise yuv420p, BT.709, CRF 16: even sizes, played by
        all.

    Raises:
      ValueError: another suffix, rate or size; at the end, no frame was written. FileNotFoundError: a missing folder.
    """

    def __init__(self, path: PathLike, fps: Fraction | float, height: int, width: int, lossless: bool = False):
        self.path, self.shape, self.lossless, self.frames = Path(path), (height, width, 3), lossless, 0
        check_target(self.path)
        if self.path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: cannot write '{self.path.suffix}' files; use one of {', '.join(SUFFIXES)}")
        if not MIN_FPS <= fps <= MAX_FPS:
            raise ValueError(f"fps={fps}: expected frames per second from 0.001 to 1000")
        if min(height, width) < 2 or (not lossless and (height % 2 or width % 2)):
            raise ValueError(f"{height}x{width}: yuv420p needs an even height and width; crop, or use lossless=True")
        self.fps = written_rate(fps)

    def __enter__(self) -> Self:
        import av

        with contextlib.ExitStack() as stack:
            part = stack.enter_context(replacing(self.path))
            self._container = stack.enter_context(av.open(f"file:{part}", "w"))
            self._stream: Any = self._container.add_stream("libx264rgb" if self.lossless else "libx264", rate=self.fps)
            self._stream.height, self._stream.width, _ = self.shape
            self._stream.pix_fmt = "rgb24" if self.lossless else "yuv420p"
            self._stream.options = {"qp": "0"} | DETERMINISTIC if self.lossless else {"crf": "16"} | DETERMINISTIC
            if not self.lossless:
                codec = self._stream.codec_context
                codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1  # BT.709, limited
                self._subsampling = _subsampling(*self.shape[:2])
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Appends one uint8 (H, W, 3) frame or several (T, H, W, 3)."""
        import av

        if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-3:] != self.shape:
            raise ValueError(f"got {frames.dtype} {frames.shape}, expected uint8 {self.shape}, or several of them")
        for pixels in frames.reshape(-1, *self.shape):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if not self.lossless:
                self._subsampling.push(frame)
                frame = self._subsampling.pull()
            frame.pts, frame.time_base = self.frames, 1 / self.fps
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def __exit__(self, *exception) -> bool | None:
        return self._stack.__exit__(*exception)

    def _finish(self, failure, *_):
        if failure is None:
            if not self.frames:
                raise ValueError(f"{self.path}: no frame was written, so no file is left; write() at least one")
            self._container.mux(self._stream.encode())


def _subsampling(height, width):
    """Returns a graph of FFmpeg's filters from RGB to yuv420p."""
    from av import VideoFormat
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat("rgb24"), time_base=Fraction(1))
    steps = graph.add("scale", YUV420P), graph.add("format", "yuv420p"), graph.add("buffersink")
    graph.link_nodes(source, *steps).configure()
    return graph


def written_rate(fps: Fraction | float) -> Fraction:
    """Returns the frames per second that a file gets: 30000/1001 for 29.97002997."""
    return Fraction(fps).limit_denominator(1001)


def write_image(path: PathLike, frame: np.ndarray) -> None:
    """Writes a uint8 RGB frame (H, W, 3) to a PNG file, which takes its name when it is complete."""
    import av

    if not str(path).lower().endswith(".png"):
        raise ValueError(f"{path}: images are written as .png")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(f"got {frame.dtype} {frame.shape}, expected uint8 (H, W, 3)")
    encoder: Any = av.CodecContext.create("png", "w")  # FFmpeg's writer of images would expand a %d in the path
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *frame.shape[:2], "rgb24", Fraction(1, 25)
    packets = encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
    with replacing(path) as part:
        part.write_bytes(b"".join(bytes(packet) for packet in [*packets, *encoder.encode(None)]))
