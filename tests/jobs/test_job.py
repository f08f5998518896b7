"""Long work that is stopped at every moment there is, and gone on with."""

import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_vae.jobs.job import PROGRESS, Job, check_begun, folder_of
from tests.patience import PATIENCE

SETTINGS = {"clip": "a.mp4", "size": (8, 8)}
PIECES = 3


def text_of(number, carry):
    return f"piece {number} after {float(carry):.3f}"


def folder_job(target, resume=True, settings=SETTINGS, stop_at=None):
    """Makes a folder of three pieces, each of which depends on the one before through the carry."""
    with Job(target, settings, resume) as job:
        size = job.decision("size", lambda: 7)
        carry = np.float64(1.5) if job.carry is None else job.carry[0]
        while not job.progress.is_complete:
            number = job.progress.pieces
            if number == stop_at:
                raise RuntimeError("stopped")
            with open(job.piece(".txt"), "w") as file:
                file.write(text_of(number, carry) + f" of {size}")
            carry = np.float64(carry * 1.1)
            job.commit((np.asarray(carry),), frames=size, latents=1, is_complete=number + 1 == PIECES)
        job.become()


def file_job(target, resume=True, settings=SETTINGS, stop_at=None):
    """Makes one file of three pieces, as a video is joined; beside it another one, as its sheet."""
    with Job(target, settings, resume) as job:
        while not job.progress.is_complete:
            number = job.progress.pieces
            if number == stop_at:
                raise RuntimeError("stopped")
            with open(job.piece(".txt"), "w") as file:
                file.write(text_of(number, number))
            job.commit(None, frames=7, latents=1, is_complete=number + 1 == PIECES)
        whole = job.folder / "whole"
        with open(whole, "w") as file:
            file.write("".join(path.read_text() for path in job.pieces(".txt")))
        os.replace(whole, target)


def contents(folder):
    """Returns every file under a folder with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def held_before(work, target, kind):
    """Puts something at the target: what was made earlier, for the work to replace."""
    if kind == "old":
        work(target, settings={"clip": "older.mp4"})
    return contents(target.parent)


@pytest.fixture(autouse=True)
def saves(request, monkeypatch):
    """Saves after every piece, or as time allows, which here is after the first and the last one."""
    every = getattr(request, "param", True)
    monkeypatch.setattr("flax_vae.jobs.job.MIN_WORK_PER_SAVE", 0 if every else 1e9)
    return every


EVERY_OR_SOME = pytest.mark.parametrize("saves", [True, False], ids=["all saved", "some saved"], indirect=True)


@EVERY_OR_SOME
@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.parametrize("work", [folder_job, file_job])
def test_work_stopped_at_any_moment_and_once_more_ends_the_same(tmp_path, power, work, kind):
    whole = tmp_path / "whole"
    whole.mkdir()
    held_before(work, whole / "target", kind)
    with power.fails(whole):
        work(whole / "target")
    moments = power.changes
    assert moments > 15
    again = np.random.default_rng(0).integers(0, moments, moments)
    for moment in range(moments):
        folder = tmp_path / str(moment)
        folder.mkdir()
        held = held_before(work, folder / "target", kind)
        with power.fails(folder, moment) as first:
            work(folder / "target")
        there = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
        assert first
        assert there in ({}, held, contents(whole))  # the moment between one folder and the other is no moment at all
        with power.fails(folder, again[moment]):
            work(folder / "target")
        work(folder / "target")
        assert contents(folder) == contents(whole)
        assert [path.name for path in folder.iterdir()] == ["target"]


@pytest.mark.parametrize("work", [folder_job, file_job])
def test_a_target_is_there_all_the_time_but_for_the_change_of_one_folder_for_another(tmp_path, power, work):
    held_before(work, tmp_path / "target", "old")
    gone = 0
    for moment in itertools.count():
        with power.fails(tmp_path, moment) as failed:
            work(tmp_path / "target")
        gone += not (tmp_path / "target").exists()
        if not failed:
            break
    assert gone <= (1 if work is folder_job else 0)


def test_work_begun_is_refused_until_told_to_go_on(tmp_path):
    with pytest.raises(RuntimeError):
        folder_job(tmp_path / "target", stop_at=2)
    for begin in (lambda: check_begun(tmp_path / "target", False), lambda: folder_job(tmp_path / "target", False)):
        with pytest.raises(ValueError, match=r"part of it is done.*--resume.*remove .*\.target\.part"):
            begin()
    check_begun(tmp_path / "target", True)
    folder_job(tmp_path / "target")
    check_begun(tmp_path / "target", False)


def test_other_settings_are_refused_and_named_with_both_values(tmp_path):
    with pytest.raises(RuntimeError):
        folder_job(tmp_path / "target", stop_at=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"\(size was \(8, 8\), now \(8, 16\)\)"):
        folder_job(tmp_path / "target", settings={**SETTINGS, "size": (8, 16)})
    with pytest.raises(ValueError, match="tiles was None, now 256"):
        folder_job(tmp_path / "target", settings={**SETTINGS, "tiles": 256})
    assert contents(tmp_path) == before
    folder_job(tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["00000.txt", "00001.txt", "00002.txt"]


@EVERY_OR_SOME
@pytest.mark.parametrize("resume", [False, True])
def test_a_failure_after_the_first_commit_says_what_is_kept_and_how_to_go_on(tmp_path, saves, resume):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("older")
    with pytest.raises(RuntimeError) as caught:
        folder_job(tmp_path / "target", resume, stop_at=2)
    (told,) = caught.value.__notes__
    assert f"{14 if saves else 7} frames are done" in told
    assert told.endswith("kept to go on from" + " with --resume" * (not resume))
    assert contents(tmp_path / "target") == {"mine": b"older"}


def test_a_failure_before_the_first_commit_leaves_nothing(tmp_path):
    (tmp_path / "target").write_text("older")
    with pytest.raises(RuntimeError) as caught:
        file_job(tmp_path / "target", stop_at=0)
    assert not hasattr(caught.value, "__notes__")
    assert contents(tmp_path) == {"target": b"older"}


def test_what_was_decided_at_the_start_holds_to_the_end(tmp_path):
    with pytest.raises(RuntimeError):
        folder_job(tmp_path / "target", stop_at=1)
    with Job(tmp_path / "target", SETTINGS, True) as job:
        assert job.decision("size", lambda: 99) == 7
        assert job.decision("other", lambda: 99) == 99


def test_what_comes_after_the_last_save_is_done_again(tmp_path, monkeypatch):
    target, clock = tmp_path / "target", iter([0.0, 1.0, 5.0, 22.0, 23.0])  # the first save takes a second
    with Job(target, SETTINGS, False) as job, monkeypatch.context() as patch:
        patch.setattr("flax_vae.jobs.job.MIN_WORK_PER_SAVE", 20)
        patch.setattr("flax_vae.jobs.job.time.monotonic", lambda: next(clock))
        for number in range(3):
            job.piece(".txt").write_text(str(number))
            job.commit((np.ones(2, np.float32) * number,), 7, 1, False)
            kept = folder_of(target) / "kept"
            shutil.copy(folder_of(target) / PROGRESS, kept.with_name(f"{number}.kept"))
        saved = [kept.with_name(f"{number}.kept").read_bytes() for number in range(3)]
    assert saved[0] == saved[1] != saved[2]


def test_pieces_after_the_last_save_and_half_written_ones_are_removed(tmp_path):
    with pytest.raises(RuntimeError):
        folder_job(tmp_path / "target", stop_at=1)
    folder = folder_of(tmp_path / "target")
    for name in ("pieces/00001.txt", "pieces/00007.txt", "pieces/.1f2e.mp4", "whole.mp4", ".5a.safetensors"):
        (folder / name).write_text("half")
    (folder / "old").mkdir()
    with Job(tmp_path / "target", SETTINGS, True):
        assert sorted(contents(folder)) == ["lock", "pieces/00000.txt", PROGRESS]
        assert not (folder / "old").exists()


def occupy(target, is_taken, may_end):
    with Job(target, SETTINGS, True) as job:
        job.piece(".txt").write_text("mine")
        is_taken.set()
        may_end.wait(PATIENCE)


@pytest.fixture
def occupied(tmp_path):
    """A target that another process is at."""
    spawn = multiprocessing.get_context("spawn")
    is_taken, may_end = spawn.Event(), spawn.Event()
    process = spawn.Process(target=occupy, args=(tmp_path / "target", is_taken, may_end))
    process.start()
    assert is_taken.wait(PATIENCE)
    yield tmp_path / "target"
    may_end.set()
    process.join(PATIENCE)


def test_a_second_process_is_refused_and_disturbs_nothing(occupied):
    before = contents(occupied.parent)
    for resume in (False, True):
        with pytest.raises(ValueError, match="another process is writing it"):
            check_begun(occupied, resume)
        with pytest.raises(ValueError, match="another process is writing it"):
            folder_job(occupied, resume)
    assert contents(occupied.parent) == before


def test_a_target_that_is_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path, power):
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        (folder / "elsewhere").mkdir(parents=True)
        (folder / "elsewhere" / "mine").write_text("older")
        (folder / "target").symlink_to(folder / "elsewhere")
        with power.fails(folder, moment) as failed:
            folder_job(folder / "target")
        folder_job(folder / "target")
        assert sorted(path.name for path in folder.iterdir()) == ["elsewhere", "target"]
        assert (folder / "elsewhere" / "mine").read_text() == "older"
        assert not (folder / "target").is_symlink()
        if not failed:
            break


def test_progress_of_something_else_is_refused_by_name(tmp_path):
    from flax_vae.io.trees import save_tree

    folder = folder_of(tmp_path / "target")
    folder.mkdir()
    for about in ({}, {"settings": "{}", "decisions": "{}", "progress": '{"places": 3}'}):
        save_tree(folder / PROGRESS, None, about)
        with pytest.raises(ValueError, match=r"\.target\.part"):
            folder_job(tmp_path / "target")


def test_pieces_of_another_version_are_not_gone_on_with(tmp_path):
    from flax_vae.io.trees import load_tree, save_tree

    with pytest.raises(RuntimeError):
        folder_job(tmp_path / "target", stop_at=1)
    path = folder_of(tmp_path / "target") / PROGRESS
    carry, about = load_tree(path)
    for changed in ({key: about[key] for key in ("settings", "decisions", "progress")}, about | {"format": "3"}):
        save_tree(path, carry, changed)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="begun by another version of flax_vae, with other pieces: go on with"):
            folder_job(tmp_path / "target")
        assert contents(tmp_path) == before
    save_tree(path, carry, about)
    folder_job(tmp_path / "target")
    assert len(contents(tmp_path / "target")) == 3


def test_work_goes_on_from_another_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError):
        folder_job(Path("target"), stop_at=1)
    monkeypatch.chdir("/")
    folder_job(tmp_path / "target")
    assert len(contents(tmp_path / "target")) == 3
