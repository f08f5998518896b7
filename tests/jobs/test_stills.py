"""Files of several frames among images: the first frame is read, with a note."""

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

from flax_vae import CausalVideoVAEConfig, to_float
from flax_vae.io.video_reader import read_clip
from flax_vae.jobs.clip import open_entry
from flax_vae.jobs.options import Options
from flax_vae.jobs.sources import open_clips
from tests.clips import encode, noise

CONFIG = CausalVideoVAEConfig.tiny()


def animated(path, frames=11):
    return encode(path.with_suffix(".apng"), noise(frames, 64, 64), "apng", "rgb24").rename(path)


def test_an_animated_png_among_images_is_its_first_frame(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    path = animated(tmp_path / "in" / "animated.png")
    encode(tmp_path / "in" / "still.png", noise(1, 64, 64), "png", "rgb24", update="1")
    opened, attempts = open_clips(tmp_path / "in", tmp_path / "out", ".png", CONFIG, Options())
    attempts.check()
    for clip, target in opened:
        (chunk,) = clip.chunks(1)
        assert chunk.frames == 1
        assert np.array_equal(chunk.data[0], to_float(read_clip(clip.path)[:1]))
        assert target == tmp_path / "out" / clip.path.name
    notes = capsys.readouterr().err
    assert f"{path}: holds more than one frame, of which the first is read" in notes
    assert notes.count("holds more") == 1


def test_an_animated_png_is_a_clip_where_it_is_called_one(tmp_path):
    path = animated(tmp_path / "animated.png")
    assert sum(chunk.frames for chunk in open_entry("video", path, CONFIG, None, None).chunks(1)) == 11
    assert sum(chunk.frames for chunk in open_entry("video", path, CONFIG, None, 3).chunks(1)) == 3
    assert sum(chunk.frames for chunk in open_entry("image", path, CONFIG, None, 3).chunks(1)) == 1
