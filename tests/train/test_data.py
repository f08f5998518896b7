"""Batches of a training run: always the same for a seed and a number, whoever reads them."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("av", reason="video files need PyAV")
pytest.importorskip("grain", reason="batches are drawn by grain")

from flax_vae.io.manifest import read_entries
from flax_vae.train.config import PRESETS, ClipConfig
from flax_vae.train.data import batches
from tests.clips import encode, remux, with_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos whose frames say which they are, and two images: red counts files, green frames, blue columns."""
    from flax_vae.io.video_writer import VideoWriter, write_image

    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        with VideoWriter(folder / f"{number}.mp4", 24, 32, 48, lossless=True) as writer:
            writer.write(np.stack([picture(number, frame) for frame in range(20)]))
    for number in range(2):
        write_image(folder / f"{number}.png", picture(10 + number, 0))
    return folder


def picture(number, frame, height=32, width=48):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 10 * number, 10 * frame
    pixels[..., 2] = 5 * np.arange(width)
    return pixels


CONFIG = ClipConfig(frames=9, size=16, batch=2, images=0.25, image_batch=3)


def drawn(folder, count, config=CONFIG, seed=0, start=0):
    return list(itertools.islice(batches(read_entries(folder), config, seed, start), count))


def equal(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def test_a_batch_is_determined_by_seed_and_number(folder):
    every = drawn(folder, 12)
    assert equal(drawn(folder, 7, start=5), every[5:])
    assert not equal(drawn(folder, 12, seed=1), every)


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_batches(folder):
    every = drawn(folder, 6)
    for workers in (1, 2):
        assert equal(drawn(folder, 4, replace(CONFIG, workers=workers), start=2), every[2:])


def test_images_and_clips_come_in_batches_of_their_own_in_their_ratio(folder):
    shapes = [batch.shape for batch in drawn(folder, 40)]
    assert set(shapes) == {(2, 9, 16, 16, 3), (3, 1, 16, 16, 3)}
    assert shapes.count((3, 1, 16, 16, 3)) == 10
    assert {batch.dtype for batch in drawn(folder, 4)} == {np.dtype(np.uint8)}


def test_clips_are_frames_in_a_row_of_one_video_and_images_are_images(folder):
    for batch in drawn(folder, 16):
        red, green = (batch[:, :, 8, 8, channel].astype(int) for channel in (0, 1))
        assert (abs(red - red[:, :1]) <= 1).all()
        assert set((red[:, 0] + 2) // 100) == ({1} if batch.shape[1] == 1 else {0})
        assert (abs(np.diff(green, axis=1) - 10) <= 2).all()


def test_all_clips_moments_and_places_are_drawn(folder):
    clips = np.concatenate(drawn(folder, 60, replace(CONFIG, images=0.0, flip=False)))
    assert set(np.round(clips[:, 0, 8, 8, 0] / 10)) == {0, 1, 2}
    assert set(np.round(clips[:, 0, 8, 8, 1] / 10)) == set(range(12))
    assert len(set(clips[:, 0, 0, 0, 2] // 8)) > 5


def test_half_of_the_clips_are_mirrored_where_they_may_be(folder):
    def falling(config):
        clips = np.concatenate(drawn(folder, 40, replace(config, images=0.0)))
        return np.mean(clips[:, 0, 8, 0, 2].astype(int) > clips[:, 0, 8, -1, 2])

    assert falling(replace(CONFIG, flip=False)) == 0
    assert 0.3 < falling(CONFIG) < 0.7


def test_zoomed_clips_show_less_of_the_frame_but_no_made_up_pixels(folder):
    def widths(zoom):
        clips = np.concatenate(drawn(folder, 40, replace(CONFIG, images=0.0, flip=False, zoom=zoom)))
        return (clips[:, 0, 8, -1, 2].astype(int) - clips[:, 0, 8, 0, 2]) / 75  # 1 for pixels of their own size

    assert widths(1.0).min() > 1.8
    assert widths(5.0).max() > 1.5
    assert widths(5.0).min() > 0.9


def test_frames_are_skipped_to_a_lower_rate(folder):
    for batch in drawn(folder, 4, replace(CONFIG, images=0.0, fps=12)):
        assert (abs(np.diff(batch[:, :, 8, 8, 1].astype(int), axis=1) - 20) <= 2).all()


def test_too_short_clips_are_listed_and_left_out(folder, tmp_path):
    config = replace(CONFIG, frames=25, images=0.0)
    with pytest.raises(ValueError, match="64 clips in a row cannot be read"):
        next(batches(read_entries(folder), config, 0, 0, tmp_path / "broken.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert {line["video"] for line in lines} == {str(folder / f"{number}.mp4") for number in range(3)}
    assert all("25" in line["error"] for line in lines)


def test_images_alone_train_only_on_images(folder, tmp_path):
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"--clips\.images 1"):
        drawn(tmp_path, 1)
    (batch,) = drawn(tmp_path, 1, replace(CONFIG, images=1.0))
    assert batch.shape == (3, 1, 16, 16, 3)


def test_videos_alone_give_their_frames_as_images(folder, tmp_path):
    (tmp_path / "0.mp4").write_bytes((folder / "0.mp4").read_bytes())
    assert {batch.shape[1] for batch in drawn(tmp_path, 8)} == {1, 9}


@pytest.mark.parametrize("name", ["0.mp4", "trimmed.mp4", "0.ts", "late.mkv", "fragments.mp4", "animated.png"])
def test_any_clip_alone_is_trained_on(folder, tmp_path, name):
    path = tmp_path / name
    if name == "0.mp4":
        shutil.copy(folder / name, path)
    elif name == "animated.png":
        clip = np.stack([picture(3, frame) for frame in range(12)])
        encode(tmp_path / "source.apng", clip, "apng", "rgb24").rename(path)
    else:
        shown = np.stack([picture(3, frame) for frame in range(20)])
        source = encode(tmp_path / "source.mp4", shown, prepare=with_options(40, bf=2, preset="ultrafast"))
        shift, options = {
            "trimmed.mp4": (-7, {"avoid_negative_ts": "disabled"}),
            "late.mkv": (250, {}),
            "fragments.mp4": (0, {"movflags": "frag_keyframe+empty_moov"}),
        }.get(name, (0, {}))
        remux(source, path, shift, **options)
    config = replace(CONFIG, images=1.0 if name.endswith("png") else 0.0)
    every = itertools.islice(batches(read_entries(path), config, 0, 0, tmp_path / "broken.jsonl"), 8)
    assert {batch.shape[1:] for batch in every} == {(1 if name.endswith("png") else 9, 16, 16, 3)}
    assert not (tmp_path / "broken.jsonl").exists()


def test_presets_differ_as_the_recipe_does():
    stage1, stage2 = PRESETS["stage1"], PRESETS["stage2"]
    assert (stage1.clips.frames, stage1.clips.size, stage1.clips.images) == (17, 256, 0.1)
    assert (stage2.clips.frames, stage2.clips.images) == (57, 0.0)
    assert (stage1.loss.mse, stage1.loss.lpips, stage1.loss.kl, stage1.gan.weight) == (10, 1, 1e-12, 0.5)
