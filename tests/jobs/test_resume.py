"""Commands that are stopped, at any moment and in any way, and gone on with: the same bytes come out."""

import functools
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

from flax_vae.jobs.job import Job, folder_of
from tests.slow import some_slow

pytest.importorskip("av", reason="video files need PyAV")
pytest.importorskip("matplotlib", reason="contact sheets need matplotlib")

COMMANDS = ("encode", "decode", "reconstruct")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, small_pieces):
    """Has every command of a test take one model, which costs more to load than short clips to encode."""
    from flax_vae.jobs import model

    load = functools.cache(model.load)
    for command in COMMANDS:
        monkeypatch.setattr(f"flax_vae.jobs.{command}.load", load)


@pytest.fixture(scope="module")
def sound_clip(tmp_path_factory, pixels):
    """The frames of `clip`, with sound."""
    import av

    path = tmp_path_factory.mktemp("sound") / "clip.mp4"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264rgb", rate=25), container.add_stream("aac", rate=48000)
        video.height, video.width, video.pix_fmt, video.options = 18, 25, "rgb24", {"qp": "0"}
        for number, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
            wave = 0.1 * np.sin(np.arange(1920 * number, 1920 * (number + 1)) * 0.05)
            frame = av.AudioFrame.from_ndarray(np.array([wave, wave], np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48000, 1920 * number
            container.mux(sound.encode(frame))
        container.mux(video.encode())
        container.mux(sound.encode())
    return path


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return tmp_path_factory.mktemp("latents") / "clip"


@pytest.fixture
def command_line(run, checkpoints, sound_clip, latents):
    """Returns a function of a command and a folder: its arguments, to write there."""
    if not latents.exists():
        assert run("encode", sound_clip, latents, "--weights", checkpoints / "vae")[0] == 0

    def arguments(command, folder):
        source = latents if command == "decode" else sound_clip
        target = folder / ("out" if command == "encode" else "out.mp4")
        return [command, source, target, "--weights", checkpoints / "vae"]

    return arguments


@pytest.fixture
def at_any_moment(run, command_line, power, tmp_path, contents):
    """Returns a function that stops a command at moments, and once more at another, and goes on with it to the end."""

    def check(command, moments=None):
        whole = tmp_path / "whole"
        whole.mkdir()
        with power.fails(whole):
            assert run(*command_line(command, whole))[0] == 0
        expected, count = contents(whole), power.changes
        rng = np.random.default_rng(COMMANDS.index(command))
        for moment in range(count) if moments is None else sorted(rng.choice(count, moments, replace=False)):
            folder = tmp_path / str(moment)
            folder.mkdir()
            args = [*command_line(command, folder), "--resume"]
            for last in (moment, rng.integers(count)):
                with power.fails(folder, last):
                    run(*args)
                there = contents(folder)
                assert all(there[name] == expected[name] for name in there.keys() & expected.keys())
            assert run(*args)[0] == 0
            assert contents(folder) == expected
            assert not folder_of(folder / "out").exists()
            shutil.rmtree(folder)

    return check


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what is cleaned up when all is over
@pytest.mark.parametrize("command", some_slow(COMMANDS, ("decode",)))
def test_a_command_stopped_at_some_moment_and_once_more_writes_the_same_bytes(at_any_moment, command):
    at_any_moment(command, 6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_stopped_at_any_moment_there_is_and_once_more_writes_the_same_bytes(at_any_moment, command):
    at_any_moment(command)


def test_frames_that_are_gone_on_with_are_those_of_the_whole_clip_without_pieces(
    run, command_line, tmp_path, monkeypatch
):
    from flax_vae.io.video_reader import read_clip

    assert run(*command_line("decode", tmp_path))[0] == 0
    monkeypatch.setattr("flax_vae.jobs.pieces.PIECE_LATENTS", 16)
    (tmp_path / "whole").mkdir()
    assert run(*command_line("decode", tmp_path / "whole"))[0] == 0
    pieces, whole = read_clip(tmp_path / "out.mp4"), read_clip(tmp_path / "whole" / "out.mp4")
    assert pieces.shape == whole.shape == (19, 16, 24, 3)
    error = np.abs(pieces.astype(int) - whole).mean()  # pictures of other groups are compressed a little otherwise
    assert error < 3 < np.abs(pieces[1:].astype(int) - whole[:-1]).mean()


def stop_after(monkeypatch, results, error):
    """Has every stream raise after so many results."""
    from flax_vae.runtime import stream

    def limited(self):
        if self.__dict__.setdefault("given", 0) == results:
            raise error
        self.given += 1
        result, self.carry = next(self._results)
        return result

    monkeypatch.setattr(stream.Stream, "__next__", limited)


@pytest.mark.usefixtures("python_signals")
@pytest.mark.parametrize(
    ("command", "number", "expected", "results"),
    [
        ("encode", signal.SIGINT, 130, 1),
        ("decode", signal.SIGTERM, 143, 2),
        ("reconstruct", signal.SIGINT, 130, 3),
        ("reconstruct", signal.SIGTERM, 143, 1),
    ],
)
def test_a_signal_keeps_what_was_committed_and_says_how_to_go_on(
    run, command_line, tmp_path, monkeypatch, contents, command, number, expected, results
):
    args = command_line(command, tmp_path)
    args[2].mkdir() if command == "encode" else args[2].write_bytes(b"the old one")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        commit = Job.commit

        def committed(self, *given):
            commit(self, *given)
            if self.progress.pieces == results:
                signal.raise_signal(number)

        patch.setattr(Job, "commit", committed)
        code, _, err = run(*args)
    assert code == expected
    assert f"{'interrupted' if number == signal.SIGINT else 'terminated'}; nothing half-written is left" in err
    assert f"{args[2]}: {(9, 17, 19)[results - 1]} frames are done, and kept to go on from with --resume" in err
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == before
    code, _, err = run(*args)
    assert code == 2
    assert "give --resume to go on" in err
    assert run(*args, "--resume")[0] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt, 130), (ValueError("broken"), 2), (OSError(28, "full"), 2)]
)
def test_a_failure_before_anything_is_whole_leaves_no_trace(
    run, command_line, tmp_path, monkeypatch, contents, command, error, code
):
    args = command_line(command, tmp_path)
    args[2].mkdir() if command == "encode" else args[2].write_bytes(b"the old one")
    before = contents(tmp_path)
    stop_after(monkeypatch, 1, error)
    found, _, err = run(*args)
    assert found == code
    assert "--resume" not in err
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_failure_later_on_keeps_what_is_done_and_the_old_result(
    run, command_line, tmp_path, monkeypatch, contents, command
):
    args = command_line(command, tmp_path)
    args[2].mkdir() if command == "encode" else args[2].write_bytes(b"the old one")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, ValueError("clip.mp4: damaged"))
        code, _, err = run(*args)
    assert code == 2
    assert err.rstrip().endswith(
        f"flax-vae: clip.mp4: damaged\n{args[2]}: 17 frames are done, and kept to go on from with --resume"
    )
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == before
    assert run(*args, "--resume")[0] == 0
    assert contents(tmp_path) != before


@pytest.fixture
def begun(run, command_line, tmp_path, monkeypatch):
    """Returns a function of a command that begins it, and gives its arguments."""

    def begin(command):
        args = command_line(command, tmp_path)
        with monkeypatch.context() as patch:
            stop_after(patch, 3, KeyboardInterrupt)
            assert run(*args)[0] == 130
        return args

    return begin


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("encode", ["--size", "16x16"], "about was .*width=24.* now .*width=16"),
        ("encode", ["--scaling", "flux"], "about was .*scaling=None.* now .*0.534"),
        ("encode", ["--weights", "{again}"], r"weights was \w{16}, now \w{16}"),
        ("encode", ["--weights", "{other}"], r"config was \w{16}, now \w{16}.*weights was"),
        ("encode", ["--lossy-tiles"], r"\(tiles was None, now LossyTiling"),
        ("reconstruct", ["--size", "16x16"], r"size was \(16, 24\), now \(16, 16\)"),
        ("decode", ["--weights", "{again}"], r"weights was \w{16}, now \w{16}"),
    ],
)
def test_going_on_with_other_settings_is_refused_and_says_what_differs(
    run, begun, checkpoints, tmp_path, contents, command, change, message
):
    args, before = begun(command), contents(tmp_path)
    names = {name: checkpoints / name for name in ("again", "other")}
    code, _, err = run(*args, *(text.format(**names) for text in change), "--resume")
    assert code == 2
    assert_found(message, err)
    assert contents(tmp_path) == before


def assert_found(pattern, text):
    assert re.search(pattern, text.replace("\n", " ")), text


def test_going_on_with_another_clip_of_the_same_name_is_refused(run, begun, sound_clip, tmp_path):
    args, data = begun("encode"), sound_clip.read_bytes()
    times = sound_clip.stat()
    try:
        sound_clip.write_bytes(data + b"\0" * 8)
        code, _, err = run(*args, "--resume")
    finally:
        sound_clip.write_bytes(data)
        os.utime(sound_clip, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert code == 2
    assert_found(r"bytes was \d+, now \d+; written was", err)


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
@pytest.mark.parametrize("frames", [9, pytest.param(17, marks=pytest.mark.slow)])
def test_fewer_frames_than_are_done_are_refused_and_more_are_not(run, begun, command, frames):
    args = begun(command)
    code, _, err = run(*args, "--frames", frames, "--resume")
    assert code == 2
    assert f"--frames {frames}: 17 frames are done already" in err
    assert run(*args, "--frames", 18, "--resume")[0] == 0


def test_another_budget_of_memory_changes_nothing_of_what_is_begun(run, begun, tmp_path, monkeypatch, contents):
    args = begun("encode")
    monkeypatch.setattr("flax_vae.jobs.budget.MAX_CHUNK_LATENTS", 4)
    assert run(*args, "--resume", "--memory", "64GiB")[0] == 0
    assert [len(data) > 0 for data in contents(tmp_path / "out").values()] == [True] * 3


SCRIPT = """
import sys
from flax_vae.jobs import budget, job, pieces
pieces.PIECE_LATENTS = budget.MAX_CHUNK_LATENTS = 1
job.MIN_WORK_PER_SAVE = 0
from flax_vae.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def process(tmp_path_factory):
    """Returns a function that starts a command as a process of its own; what they compile is kept for the next."""
    cache = tmp_path_factory.getbasetemp() / "compiled"
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "",  # one device
        "PYTHONPATH": str(ROOT),
    }
    started = []

    def start(*args):
        command = [sys.executable, "-c", SCRIPT, *map(str, args)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def killed_and_gone_on_with(process, args, contents, folder, expected, delays):
    """Kills a command, each time so many seconds after it has begun to work, and then lets it end."""
    killed = 0
    for delay in delays:
        running = process(*args, "--resume")
        while running.poll() is None and not folder_of(args[2]).exists():
            time.sleep(0.01)
        time.sleep(delay)
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
        killed += running.wait() == -signal.SIGKILL
        there = contents(folder)
        assert all(there[name] == expected[name] for name in there.keys() & expected.keys())
    last = process(*args, "--resume")
    assert last.wait() == 0, last.stderr.read()
    assert contents(folder) == expected
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return killed


def whole_and_time(process, args, contents, folder):
    """Runs a command to its end; gives what it has written, and for how long it has worked."""
    folder.mkdir()
    running = process(*args)
    while running.poll() is None and not folder_of(args[2]).exists():
        time.sleep(0.01)
    began = time.monotonic()
    assert running.wait() == 0, running.stderr.read()
    return contents(folder), time.monotonic() - began


@pytest.mark.slow
def test_a_process_killed_at_two_moments_writes_the_same_bytes_in_the_end(process, command_line, tmp_path, contents):
    args = command_line("reconstruct", tmp_path / "whole")
    process(*args[:2], tmp_path / "first.mp4", *args[3:]).wait()  # compiles
    expected, seconds = whole_and_time(process, args, contents, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    delays = seconds * np.random.default_rng(0).uniform(0.1, 0.9, 2)
    args = command_line("reconstruct", tmp_path / "killed")
    assert killed_and_gone_on_with(process, args, contents, tmp_path / "killed", expected, delays) > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_killed_at_many_moments_writes_the_same_bytes_in_the_end(
    process, command_line, tmp_path, contents, command
):
    args = command_line(command, tmp_path / "whole")
    process(*args[:2], tmp_path / f"first{args[2].suffix}", *args[3:]).wait()
    expected, seconds = whole_and_time(process, args, contents, tmp_path / "whole")
    rng, killed = np.random.default_rng(COMMANDS.index(command)), 0
    for trial in range(4):
        folder = tmp_path / str(trial)
        folder.mkdir()
        delays = seconds * rng.uniform(0, 1, 3)
        killed += killed_and_gone_on_with(process, command_line(command, folder), contents, folder, expected, delays)
    assert killed > 4
