"""Where colours lie in written and read files: waves of colour, whose place is found to a hundredth of a pixel."""

from fractions import Fraction

import numpy as np
import pytest

from flax_vae.io.video_reader import read_clip
from flax_vae.io.video_writer import VideoWriter

av = pytest.importorskip("av", reason="video needs PyAV: pip install av")

SIZE, PERIOD = (64, 128), 16
PLACES = {"left": (0, 128), "center": (128, 128), "topleft": (0, 0)}  # of chroma samples, in 256ths of their distance


def wave(axis):
    """A frame whose hue swings along an axis, 0 for the height."""
    length = SIZE[axis]
    swing = 0.5 + 0.45 * np.sin(2 * np.pi * np.arange(length) / PERIOD).reshape((-1, 1) if axis == 0 else (1, -1))
    frame = np.full((*SIZE, 3), 60, np.uint8)
    frame[..., 0], frame[..., 2] = 255 * swing, 255 * (1 - swing)
    return frame


def shift(before, after, axis):
    """Returns by how many pixels the hue has moved."""
    hue = [(frame[..., 0].astype(float) - frame[..., 2]).mean(1 - axis) for frame in (before, after)]
    phase = [np.angle(np.fft.fft(values)[SIZE[axis] // PERIOD]) for values in hue]
    return (phase[0] - phase[1]) / (2 * np.pi) * PERIOD


def write_marked(path, frame, codec, pix_fmt, place, mark):
    """Writes a clip whose chroma samples lie at a place, with PyAV alone."""
    across, down = PLACES[place]
    how = f"flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp:out_h_chr_pos={across}:out_color_matrix=bt709"
    graph = av.filter.Graph()
    source = graph.add_buffer(width=SIZE[1], height=SIZE[0], format="rgb24", time_base=Fraction(1))
    scale = graph.add("scale", how + (f":out_v_chr_pos={down}" if "420" in pix_fmt else ""))
    graph.link_nodes(source, scale, graph.add("format", pix_fmt), graph.add("buffersink")).configure()
    graph.push(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.colorspace = *SIZE, pix_fmt, 1
        stream.options = {"crf": "4", "b": "5M"} | ({"chroma_sample_location": mark} if mark else {})
        container.mux([*stream.encode(graph.pull()), *stream.encode()])
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("axis", [0, 1])
def test_colours_are_read_where_they_were_written(tmp_path, suffix, axis):
    frame, path = wave(axis), tmp_path / f"clip{suffix}"
    with VideoWriter(path, 25, *SIZE) as writer:
        writer.write(np.stack([frame] * 3))
    assert all(abs(shift(frame, again, axis)) < 0.05 for again in read_clip(path))


def test_colours_of_written_files_lie_where_h264_means_by_itself(tmp_path):
    """Compares the chroma plane with that of samples on the left, for players that read no mark."""
    frame, planes = wave(1), []
    with VideoWriter(tmp_path / "ours.mp4", 25, *SIZE) as writer:
        writer.write(frame)
    write_marked(tmp_path / "left.mp4", frame, "libx264", "yuv420p", "left", None)
    write_marked(tmp_path / "center.mp4", frame, "libx264", "yuv420p", "center", None)
    for name in ("ours", "left", "center"):
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            planes.append(next(container.decode(video=0)).to_ndarray()[SIZE[0] :].astype(int))
    ours, left, center = planes
    assert np.abs(ours - left).mean() < 1 < 5 * np.abs(ours - left).mean() < np.abs(ours - center).mean()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "place", "mark"),
    [
        ("h264 by itself", "libx264", "yuv420p", "left", None),
        ("h264", "libx264", "yuv420p", "center", "center"),
        ("h264", "libx264", "yuv420p", "topleft", "topleft"),
        ("h264 of 10 bits", "libx264", "yuv420p10le", "center", "center"),
        ("h264 of half the width", "libx264", "yuv422p10le", "left", None),
        ("vp8 by itself", "libvpx", "yuv420p", "center", None),
        ("vp9", "libvpx-vp9", "yuv420p", "left", "left"),
        ("ffv1", "ffv1", "yuv420p", "left", "left"),
        ("mpeg4 by itself", "mpeg4", "yuv420p", "left", None),
        ("mpeg1 by itself", "mpeg1video", "yuv420p", "center", None),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_colours_are_read_where_a_file_or_its_standard_puts_them(tmp_path, name, codec, pix_fmt, place, mark, axis):
    frame = wave(axis)
    path = write_marked(tmp_path / "clip.mkv", frame, codec, pix_fmt, place, mark)
    assert abs(shift(frame, read_clip(path)[0], axis)) < 0.05
