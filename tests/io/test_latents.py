"""Latents on disk: what is written is read, and what is not of one clip says so. t h w z of latents."""

import contextlib
import json
import os
import re
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_vae.io.latents import About, Latents, write_latents

ABOUT = About(24, 16, Fraction(30000, 1001), "c0", "w0", {"first_shift": 0.5, "rest_shift": [1.0, 2.0]})
SIZES = (3, 2, 2, 1)  # latents of each file


def draw(t, seed=0, size=(3, 2, 4)):
    return np.random.default_rng(seed).standard_normal((2, 1, t, *size)).astype(np.float32)


def write_clip(folder, about=ABOUT, seed=0):
    """Writes eight latents, 1 + 7 * 8 - 3 frames, as four files; gives mean and logvar of all."""
    folder.mkdir()
    mean, logvar = draw(sum(SIZES), seed)
    start = 0
    for number, t in enumerate(SIZES):
        frames = 8 * t - (7 if number == 0 else 3 * (number == 3))
        cut, last = slice(start, start + t), number == 3
        write_latents(folder / f"{number:05d}.safetensors", about, mean[:, cut], logvar[:, cut], frames, start, last)
        start += t
    return mean, logvar


def rewrite(path, metadata=(), **arrays):
    """Writes a file anew with other metadata or arrays; a value of None leaves an entry out."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    texts = present(json.loads(data[8 : 8 + length])["__metadata__"] | dict(metadata))
    held = present(load_file(path) | arrays)
    save_file(held, path, texts)


def present(entries) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def test_a_folder_of_files_is_read_as_one_clip_to_the_last_bit(tmp_path):
    mean, logvar = write_clip(tmp_path / "clip")
    latents = Latents(tmp_path / "clip")
    assert latents.about == ABOUT
    assert latents.shape == (8, 3, 2, 4)
    assert latents.frames == 1 + 7 * 8 - 3
    assert [shard.start for shard in latents.shards] == [0, 3, 5, 7]
    assert latents.read().tobytes() == mean.tobytes()
    assert latents.read("logvar").tobytes() == logvar.tobytes()


@pytest.mark.parametrize("start", range(9))
def test_means_go_on_from_any_latent(tmp_path, start):
    mean, _ = write_clip(tmp_path / "clip")
    parts = list(Latents(tmp_path / "clip").means(start))
    assert len(parts) == 8 - start
    assert all(np.array_equal(part, whole) for part, whole in zip(parts, mean[0, start:], strict=True))


def test_a_single_file_is_a_clip_of_its_own(tmp_path):
    mean, logvar = draw(2)
    write_latents(tmp_path / "a.safetensors", ABOUT, mean, logvar, frames=9)
    latents = Latents(tmp_path / "a.safetensors")
    assert (latents.frames, latents.shape) == (9, (2, 3, 2, 4))
    assert np.array_equal(next(latents.means()), mean[0, 0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_times_are_kept_where_the_rate_does_not_tell_them(tmp_path):
    mean, logvar = draw(2)
    times = [Fraction(i * i, 90000) for i in range(10)]
    write_latents(tmp_path / "a.safetensors", ABOUT, mean, logvar, 9, times=times)
    assert Latents(tmp_path / "a.safetensors").times == times
    write_clip(tmp_path / "clip")
    count = Latents(tmp_path / "clip").frames
    assert Latents(tmp_path / "clip").times == [i / ABOUT.fps for i in range(count + 1)]
    later = json.dumps([30000, *(1001 * i + 90 for i in range(17, 34))])  # of one file in the middle
    rewrite(tmp_path / "clip" / "00001.safetensors", {"times": later})
    moved = [i / ABOUT.fps + (Fraction(90, 30000) if 17 <= i < 33 else 0) for i in range(count + 1)]
    assert Latents(tmp_path / "clip").times == moved


def test_other_tools_read_the_files_and_what_they_say(tmp_path):
    mean, _ = write_clip(tmp_path / "clip")
    held = load_file(tmp_path / "clip" / "00001.safetensors")
    assert set(held) == {"mean", "logvar"}
    assert np.array_equal(held["mean"], mean[:, 3:5])
    data = (tmp_path / "clip" / "00001.safetensors").read_bytes()
    texts = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    assert texts["fps"] == "30000/1001"
    assert texts["start"], texts["frames"] == ("3", "16")
    assert json.loads(texts["scaling"]) == ABOUT.scaling


def test_identity_tells_files_that_were_written_again(tmp_path):
    write_clip(tmp_path / "clip")
    before = Latents(tmp_path / "clip").identity
    assert Latents(tmp_path / "clip").identity == before
    os.utime(tmp_path / "clip" / "00002.safetensors", ns=(1, 1))
    assert Latents(tmp_path / "clip").identity != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clip, other: (clip / "00001.safetensors").unlink(), "00002.* does not follow"),
        (lambda clip, other: (clip / "00003.safetensors").unlink(), "lacks its end"),
        (lambda clip, other: (clip / "00000.safetensors").unlink(), "00001.* does not follow"),
        (lambda clip, other: (other / "00001.safetensors").rename(clip / "00001.safetensors"), "00001.*not follow"),
        (lambda clip, other: (other / "00003.safetensors").rename(clip / "00004.safetensors"), "goes on after its end"),
        (lambda clip, other: (clip / "00001.safetensors").rename(clip / "00009.safetensors"), "00002.*not follow"),
        (lambda clip, other: rewrite(clip / "00003.safetensors", {"start": "8"}), "00003.*not follow"),
        (lambda clip, other: rewrite(clip / "00001.safetensors", {"last": "true"}), "goes on after its end"),
        (lambda clip, other: rewrite(clip / "00001.safetensors", {"fps": "25"}), "00001.*not follow"),
        (lambda clip, other: (clip / "00002.safetensors").write_bytes(b""), "00002.*an empty file"),
        (lambda clip, other: os.truncate(clip / "00002.safetensors", 300), "00002.*not valid safetensors"),
        (lambda clip, other: os.truncate(clip / "00002.safetensors", 700), "00002.*not valid safetensors"),
    ],
)
def test_files_that_are_not_all_of_one_clip_are_refused_by_name(tmp_path, change, message):
    write_clip(tmp_path / "clip")
    write_clip(tmp_path / "other", About(24, 16, Fraction(30000, 1001), "c0", "other"), seed=1)
    change(tmp_path / "clip", tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        Latents(tmp_path / "clip")


BAD = {
    "no latents": {"format": "pt"},
    "older": {"version": "1"},
    "no height": {"height": None},
    "no frames": {"frames": None},
    "text for a number": {"height": "tall"},
    "half a number": {"start": "1.5"},
    "negative start": {"start": "-1"},
    "no frame": {"frames": "0"},
    "negative frames": {"frames": "-9"},
    "endless digits": {"frames": "9" * 5000},
    "rate of nothing": {"fps": "0"},
    "rate over nothing": {"fps": "25/0"},
    "negative rate": {"fps": "-25"},
    "rate beyond all memory": {"fps": "1e999999999"},
    "rate that is none": {"fps": "nan"},
    "deep scaling": {"scaling": "[" * 100_000},
    "torn scaling": {"scaling": "{"},
    "torn last": {"last": ""},
    "torn times": {"times": "[30, 0"},
    "times of other frames": {"times": "[30, 0, 1, 2]"},
    "times that go back": {"times": json.dumps([30, *range(17), 15])},
    "times that are none": {"times": json.dumps([30, *range(17), "17"])},
    "times of no clock": {"times": json.dumps([0, *range(18)])},
    "deep times": {"times": "[" * 100_000},
}
ARRAYS = {
    "no mean": {"mean": None},
    "other length": {"logvar": draw(1)[0]},
    "other size": {"logvar": draw(3, size=(2, 2, 4))[0]},
    "no batch": {"mean": draw(3)[0, 0], "logvar": draw(3)[0, 0]},
    "two clips": {"mean": draw(3)[:, 0], "logvar": draw(3)[:, 0]},
    "nothing": {"mean": draw(0)[0], "logvar": draw(0)[0]},
    "integers": {"mean": np.zeros((1, 3, 3, 2, 4), np.int64), "logvar": np.zeros((1, 3, 3, 2, 4), np.int64)},
    "half precision": {"mean": draw(3)[0].astype(np.float16), "logvar": draw(3)[1].astype(np.float16)},
}


@pytest.mark.parametrize("kind", [*BAD, *ARRAYS])
def test_a_hostile_file_is_refused_by_name_in_one_paragraph(tmp_path, kind):
    write_clip(tmp_path / "clip")
    path = tmp_path / "clip" / "00000.safetensors"
    rewrite(path, BAD.get(kind, ()), **ARRAYS.get(kind, {}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a latents file, or damaged: ") as caught:
        Latents(tmp_path / "clip")
    assert len(str(caught.value)) < 600


def test_a_header_of_random_bytes_is_refused(tmp_path):
    write_clip(tmp_path / "clip")
    path, rng = tmp_path / "clip" / "00000.safetensors", np.random.default_rng(3)
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(length)] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(ValueError):  # and nothing else; a changed letter of a name is no damage
            Latents(path)
            refused -= 1
        refused += 1
    assert refused > 150


def test_no_files_are_refused_with_what_writes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; flax-vae encode"):
        Latents(tmp_path / "none")
    (tmp_path / "00000.txt").write_text("")
    (tmp_path / ".00000.safetensors").write_text("")
    with pytest.raises(ValueError, match="holds no latents"):
        Latents(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    mean, logvar = draw(2)
    path = tmp_path / "a.safetensors"
    write_latents(path, ABOUT, mean, logvar, frames=9)
    before = path.read_bytes()
    monkeypatch.setattr("flax_vae.io.weights.Arrays.read", lambda self, key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_latents(path, ABOUT, logvar, mean, frames=9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before
