"""`flax-vae extract`: latents of a data set, whatever is in it, and however it is stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flax_vae import LatentScaling
from flax_vae.io.latents import Latents
from flax_vae.io.video_writer import VideoWriter, write_image

av = pytest.importorskip("av", reason="video files need PyAV")

BROKEN = ("cut.mp4", "deep/text.mp4", "empty.mp4", "none.mp4", "torn.png")
WHOLE = {"a.mp4": 9, "b.mp4": 9, "deep/c.mp4": 6, "d.png": 1, "e.mp4": 9}


def write(path, pixels, lossless=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        write_image(path, pixels[0])
    else:
        with VideoWriter(path, 25, *pixels.shape[1:3], lossless=lossless) as writer:
            writer.write(pixels)
    return path


@pytest.fixture(scope="module")
def frames(pixels):
    """Frames that need no scaling."""
    return np.ascontiguousarray(pixels[:, :16, :24])


@pytest.fixture
def clips(tmp_path, frames):
    """A folder of clips of one size, some of which are broken."""
    folder = tmp_path / "clips"
    for number, (name, count) in enumerate(WHOLE.items()):
        write(folder / name, np.roll(frames, number, axis=0)[:count])
    (folder / "deep" / "text.mp4").write_text("this is no clip")
    (folder / "empty.mp4").touch()
    (folder / "torn.png").write_bytes((folder / "d.png").read_bytes()[:60])
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(str(folder / "none.mp4"), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24")))
        container.mux(stream.encode())
    data = (folder / "none.mp4").read_bytes()
    (folder / "none.mp4").write_bytes(data[: data.index(b"moof") - 4])
    spoil(write(folder / "cut.mp4", frames[:9]), 6)
    (folder / "notes.txt").write_text("mine")
    return folder


def spoil(path, number):
    """Overwrites a frame with zeros."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data, (place, size) = bytearray(path.read_bytes()), packets[number]
    data[place : place + size] = bytes(size)
    path.write_bytes(data)


@pytest.fixture
def extract(run, checkpoints, monkeypatch, small_pieces):
    """Returns a function that extracts, at most two clips together."""
    monkeypatch.setattr("flax_vae.jobs.budget.MAX_BATCH_CLIPS", 2)
    return lambda source, out, *args: run("extract", source, out, "--weights", checkpoints / "vae", *args)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_statistics(out):
    """Compares the statistics with numpy's over all latents."""
    clips = [Latents(out / line["latents"]) for line in lines(out / "manifest.jsonl")]
    stated = json.loads((out / "statistics.json").read_text())
    for name, cut in (("first", slice(0, 1)), ("rest", slice(1, None))):
        mean, logvar = (
            np.concatenate([clip.read(kind)[:, cut].reshape(-1, 16) for clip in clips]).astype(np.float64)
            for kind in ("mean", "logvar")
        )
        assert stated[name]["count"] == len(mean)
        assert np.allclose(stated[name]["mean"], mean.mean(axis=0), rtol=1e-9, atol=1e-12)
        assert np.allclose(stated[name]["std"], np.sqrt(mean.var(axis=0) + np.exp(logvar).mean(axis=0)), rtol=1e-9)
    return stated


def test_all_of_a_folder_is_encoded_and_what_is_broken_is_listed(run, extract, checkpoints, clips, tmp_path):
    out = tmp_path / "out"
    code, shown, err = extract(clips, out)
    assert code == 0
    held = {line["video"] if "video" in line else line["image"]: line for line in lines(out / "manifest.jsonl")}
    assert list(held) == [str(clips / name) for name in sorted(WHOLE)]
    assert [("image" in line) for line in held.values()] == [name.endswith(".png") for name in sorted(WHOLE)]
    for name, count in WHOLE.items():
        latents = Latents(out / held[str(clips / name)]["latents"])
        assert held[str(clips / name)]["latents"] == f"latents/{name}.safetensors"
        assert latents.frames == count
        assert latents.shape == (-(-(count - 1) // 8) + 1, 2, 3, 16)
    failed = lines(out / "failed.jsonl")
    assert [line.get("video") or line.get("image") for line in failed] == [str(clips / name) for name in BROKEN]
    for line, said in zip(failed, ("damaged", "no video", "empty", "no frame decodes", "damaged"), strict=True):
        assert said in line["error"]
        assert f"left out: {line['error']}" in err
    assert re.search(rf"clips left out\W+{len(BROKEN)}\W", shown)
    stated = check_statistics(out)

    args = "--weights", checkpoints / "vae"
    scaling = "--scaling", out / "statistics.json"
    assert run("encode", clips / "a.mp4", tmp_path / "one", *args, *scaling)[0] == 0
    about = Latents(tmp_path / "one").about
    assert LatentScaling.from_dict(about.scaling).rest_shift == tuple(stated["rest"]["mean"])


def test_clips_encoded_together_have_the_latents_of_one_alone(run, extract, checkpoints, clips, tmp_path):
    assert extract(clips, tmp_path / "out")[0] == 0
    for name in WHOLE:
        assert run("encode", clips / name, tmp_path / "alone", "--weights", checkpoints / "vae")[0] == 0
        together, alone = Latents(tmp_path / "out" / "latents" / f"{name}.safetensors"), Latents(tmp_path / "alone")
        assert (together.frames, together.about) == (alone.frames, alone.about)
        for kind in ("mean", "logvar"):
            assert np.allclose(together.read(kind), alone.read(kind), atol=1e-5)


def test_a_manifest_names_its_clips_and_frames_are_cut(extract, clips, tmp_path):
    manifest = tmp_path / "all.jsonl"
    entries = [{"video": "clips/b.mp4", "text": "a"}, {"image": "clips/d.png"}, {"video": "gone.mp4"}]
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert extract(manifest, tmp_path / "out", "--frames", 5)[0] == 0
    held = lines(tmp_path / "out" / "manifest.jsonl")
    assert [line.get("video") or line.get("image") for line in held] == [str(clips / "b.mp4"), str(clips / "d.png")]
    assert [Latents(tmp_path / "out" / line["latents"]).frames for line in held] == [5, 1]
    (failed,) = lines(tmp_path / "out" / "failed.jsonl")
    assert "gone.mp4: no such file" in failed["error"]


def test_images_alone_have_no_scaling_and_a_folder_of_broken_files_no_statistics(extract, clips, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(clips / "d.png", images / "d.png")
    code, _, err = extract(images, tmp_path / "out")
    assert code == 0
    assert "no scaling can be made: of the later frames of clips there is none" in err
    assert json.loads((tmp_path / "out" / "statistics.json").read_text())["scaling"] is None
    (images / "d.png").write_text("no image")
    code, _, err = extract(images, tmp_path / "none")
    assert code == 2
    assert f"{images}: no clip can be encoded\n{images / 'd.png'}: " in err
    assert lines(tmp_path / "none" / "manifest.jsonl") == []
    assert not (tmp_path / "none" / "statistics.json").exists()


def state(folder, contents):
    """Returns what an extraction has written, without its logs: these tell also how it went."""
    return {name: data for name, data in contents(folder).items() if "log-" not in name}


def normal(written):
    """Returns the same with statistics to nine digits, as their sum depends on the order."""
    statistics = json.loads(written["statistics.json"])
    numbers = [x for part in ("first", "rest") for kind in ("mean", "std") for x in statistics[part][kind]]
    return {**written, "statistics.json": [f"{x:.9e}" for x in numbers]}


def same_latents(one, other, tmp_path):
    """Compares what two extractions hold: other batches may round otherwise."""
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(".safetensors"):
            a, b = (np.frombuffer(written[name][-2 * 4 * 96 :], np.float32) for written in (one, other))
            assert np.allclose(a, b, atol=1e-5)
        elif name != "statistics.json":
            assert one[name] == other[name]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stopped_at_some_moment_it_goes_on_where_it_was(extract, clips, tmp_path, power, contents, monkeypatch):
    import functools

    from flax_vae.jobs import model

    monkeypatch.setattr("flax_vae.jobs.extract.load", functools.cache(model.load))
    out, whole = tmp_path / "out", tmp_path / "whole"
    with power.fails(whole):
        assert extract(clips, whole)[0] == 0
    for moment in np.random.default_rng(0).choice(power.changes, 6, replace=False):
        with power.fails(out, moment) as failed:
            extract(clips, out)
        assert failed
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        logged = [line["latents"] for log in out.glob("log-*") for line in lines(log)[1:] if "latents" in line]
        assert extract(clips, out)[0] == 0
        assert all((out / name).stat().st_mtime_ns == before[out / name] for name in logged)
        same_latents(state(out, contents), state(whole, contents), tmp_path)
        check_statistics(out)
        assert not [path for path in out.rglob(".*") if not path.name.endswith(".lock")]
        shutil.rmtree(out)


def test_a_torn_line_of_the_log_is_done_again(extract, clips, tmp_path):
    out = tmp_path / "out"
    assert extract(clips, out)[0] == 0
    (log,) = out.glob("log-*")
    written = [line for line in log.read_bytes().splitlines(keepends=True) if b'"latents"' in line]
    log.write_bytes(log.read_bytes().replace(written[-1], b"") + written[-1][:-9])
    assert extract(clips, out)[0] == 0
    assert len([line for line in lines(log) if "latents" in line]) == len(WHOLE)
    check_statistics(out)


def test_what_could_not_be_read_is_tried_again(extract, clips, tmp_path, frames):
    out = tmp_path / "out"
    assert extract(clips, out)[0] == 0
    write(clips / "empty.mp4", frames[:9])
    assert extract(clips, out)[0] == 0
    assert len(lines(out / "manifest.jsonl")) == len(WHOLE) + 1
    assert len(lines(out / "failed.jsonl")) == len(BROKEN) - 1
    check_statistics(out)


def test_clips_that_are_no_longer_listed_do_not_count(extract, clips, tmp_path):
    out = tmp_path / "out"
    assert extract(clips, out)[0] == 0
    (clips / "a.mp4").unlink()
    assert extract(clips, out)[0] == 0
    assert len(lines(out / "manifest.jsonl")) == len(WHOLE) - 1
    check_statistics(out)


def test_parts_one_after_the_other_do_what_one_does(extract, clips, tmp_path, contents):
    out = tmp_path / "out"
    assert extract(clips, tmp_path / "whole")[0] == 0
    code, _, err = extract(clips, out, "--part", "2/2")
    assert code == 0
    assert "clips are other parts' to do; the last to end writes" in err
    assert not (out / "manifest.jsonl").exists()
    assert extract(clips, out, "--part", "1/2")[0] == 0
    same_latents(state(out, contents), state(tmp_path / "whole", contents), tmp_path)
    check_statistics(out)


def test_parts_may_be_run_again_after_a_clip_has_come(extract, clips, tmp_path, frames):
    out = tmp_path / "out"
    for number in ("1/2", "2/2"):
        assert extract(clips, out, "--part", number)[0] == 0
    write(clips / "0.mp4", frames[:9])  # every clip is the other part's from now on
    for number in ("1/2", "2/2"):
        assert extract(clips, out, "--part", number)[0] == 0
    assert len(lines(out / "manifest.jsonl")) == len(WHOLE) + 1
    check_statistics(out)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "4", "size=4: too small, this model takes multiples of 8 pixels from 8 on"),
        ("--size", "4x24", "size=(4, 24): too small"),
        ("--size", "big", "--size big: expected the short side"),
        ("--frames", "0", "--frames 0: expected 1 or more"),
    ],
)
def test_what_no_clip_can_have_is_refused_before_any_work(extract, clips, tmp_path, option, value, message):
    code, _, err = extract(clips, tmp_path / "out", option, value)
    assert code == 2
    assert message in err
    assert "loading" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "8"], "was begun otherwise, with"),
        (["--frames", "3"], "was begun otherwise, with"),
        (["--part", "1/2"], "was begun with another number of parts (log-00001-of-00001.jsonl)"),
    ],
)
def test_other_settings_are_refused(extract, clips, tmp_path, contents, args, message):
    out = tmp_path / "out"
    assert extract(clips, out)[0] == 0
    before = contents(out)
    code, _, err = extract(clips, out, *args)
    assert code == 2
    assert message in err
    assert contents(out) == before


def test_a_part_with_other_settings_than_the_others_is_refused(extract, clips, tmp_path):
    assert extract(clips, tmp_path / "out", "--part", "1/2")[0] == 0
    code, _, err = extract(clips, tmp_path / "out", "--part", "2/2", "--frames", 5)
    assert code == 2
    assert "log-00001-of-00002.jsonl: was begun otherwise" in err
    assert extract(clips, tmp_path / "out", "--part", "2/2")[0] == 0


def test_a_long_clip_becomes_a_folder_that_is_gone_on_with(extract, frames, tmp_path, power, monkeypatch, contents):
    monkeypatch.setattr("flax_vae.jobs.extract.PIECE_LATENTS", 1)
    clips, out = tmp_path / "clips", tmp_path / "out"
    write(clips / "long.mp4", np.concatenate([frames, frames]))
    spoil(write(clips / "longer.mp4", np.concatenate([frames, frames])), 30)
    write(clips / "short.mp4", frames[:9])
    write(clips / "unstated.mkv", frames[:9])
    with power.fails(out):
        assert extract(clips, out)[0] == 0
    held = {Path(line["video"]).name: line["latents"] for line in lines(out / "manifest.jsonl")}
    assert held == {
        "long.mp4": "latents/long.mp4",
        "short.mp4": "latents/short.mp4.safetensors",
        "unstated.mkv": "latents/unstated.mkv",
    }
    assert len(Latents(out / held["long.mp4"]).shards) == 5
    assert [Path(line["video"]).name for line in lines(out / "failed.jsonl")] == ["longer.mp4"]
    check_statistics(out)
    with power.fails(tmp_path / "again", 40) as failed:
        extract(clips, tmp_path / "again")
    assert failed
    assert (tmp_path / "again" / "latents" / ".long.mp4.part").exists()
    assert extract(clips, tmp_path / "again")[0] == 0
    same = state(tmp_path / "again", contents)
    assert {k: v for k, v in same.items() if "statis" not in k} == {
        k: v.replace(bytes(out), bytes(tmp_path / "again"))
        for k, v in state(out, contents).items()
        if "statis" not in k
    }


def test_a_header_that_states_another_number_of_frames_changes_nothing(extract, frames, tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for name, stated in (("fewer.avi", 5), ("more.avi", 14), ("right.avi", 19)):
        with av.open(str(clips / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = 16, 24, "yuv420p"
            for picture in frames[: 9 if name == "more.avi" else 19]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        data = bytearray((clips / name).read_bytes())
        place = data.index(b"strh") + 8 + 32
        data[place : place + 4] = stated.to_bytes(4, "little")
        (clips / name).write_bytes(data)
    assert extract(clips, out)[0] == 0
    held = {Path(line["video"]).name: Latents(out / line["latents"]) for line in lines(out / "manifest.jsonl")}
    assert {name: latents.frames for name, latents in held.items()} == {"fewer.avi": 19, "right.avi": 19}
    assert np.allclose(held["fewer.avi"].read(), held["right.avi"].read(), atol=1e-5)
    (failed,) = lines(out / "failed.jsonl")  # as much as is missing of a file that is cut short
    assert "0.56 s long by its header, but ends at 0.36 s" in failed["error"]


def test_a_clip_that_breaks_in_a_batch_does_not_touch_the_other(run, extract, checkpoints, frames, tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "out"
    spoil(write(clips / "a.mp4", frames[:18]), 12)
    write(clips / "b.mp4", frames[:18])
    assert extract(clips, out)[0] == 0
    assert run("encode", clips / "b.mp4", tmp_path / "alone", "--weights", checkpoints / "vae")[0] == 0
    assert [Path(line["video"]).name for line in lines(out / "failed.jsonl")] == ["a.mp4"]
    together, alone = Latents(out / "latents" / "b.mp4.safetensors"), Latents(tmp_path / "alone")
    assert np.allclose(together.read(), alone.read(), atol=1e-5)
    assert not (out / "latents" / "a.mp4.safetensors").exists()


def test_no_damage_to_a_file_is_fatal(extract, frames, tmp_path):
    """Changes random bytes of many copies of a clip: each is encoded or listed."""
    clips, out, rng = tmp_path / "clips", tmp_path / "out", np.random.default_rng(5)
    for suffix in (".mp4", ".mkv", ".png"):
        data = write(clips / f"whole{suffix}", frames[:9]).read_bytes()
        for number in range(12):
            spoiled = bytearray(data)
            for _ in range(1 + number % 4):
                spoiled[rng.integers(len(data) if number % 2 else min(200, len(data)))] = rng.integers(256)
            (clips / f"{number}{suffix}").write_bytes(spoiled)
    code, _, err = extract(clips, out, "--size", "16x24")
    assert code == 0
    done, failed = lines(out / "manifest.jsonl"), lines(out / "failed.jsonl")
    assert len(done) + len(failed) == 39
    assert len(failed) > 5
    assert "more, in" in err


SCRIPT = """
import sys
from flax_vae.jobs import budget, pieces
pieces.PIECE_LATENTS = budget.MAX_CHUNK_LATENTS = 1
budget.MAX_BATCH_CLIPS = 2
from flax_vae.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def process(checkpoints, tmp_path_factory):
    """Returns a function that starts an extraction as a process of its own."""
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "",  # one device
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    started = []

    def start(source, out, *args):
        command = [sys.executable, "-c", SCRIPT, "extract", source, out, "--weights", checkpoints / "vae", *args]
        started.append(subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_parts_at_the_same_time_and_killed_do_what_one_does(process, extract, clips, tmp_path, contents, frames):
    for number in range(12):
        write(clips / f"more{number}.mp4", np.roll(frames, number, axis=0)[:9])
    out, rng = tmp_path / "out", np.random.default_rng(1)
    assert process(clips, tmp_path / "whole").wait() == 0
    for _ in range(3):
        parts = [process(clips, out, "--part", f"{number}/2") for number in (1, 2)]
        while any(part.poll() is None for part in parts) and not list(out.glob("latents/*")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        for part in parts:
            if part.poll() is None:
                os.kill(part.pid, signal.SIGKILL)
            part.wait()
    assert [part.wait() for part in [process(clips, out, "--part", f"{number}/2") for number in (1, 2)]] == [0, 0]
    same_latents(state(out, contents), state(tmp_path / "whole", contents), tmp_path)
    check_statistics(out)
    assert process(clips, out, "--part", "1/2").wait() == 0
