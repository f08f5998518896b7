"""The fuzz run: what watches over it notices every kind of failure, and none is found in the functions that read."""

import ctypes
import os
import subprocess
import time
from collections import Counter

import numpy as np
import pytest

from tests.fuzz.mutations import make_input
from tests.fuzz.run import fuzz
from tests.fuzz.samples import Sample, make_samples, read_samples

NEVER_READ = {"hostile.pt", "pickle.bin"}  # they would run a command


def refuses(path, number):
    raise ValueError(f"{path}: is damaged")


def reads_nothing(path, number):
    pass


def names_no_file(path, number):
    raise ValueError("it is damaged")


def raises_another_error(path, number):
    raise KeyError(f"{path}")


def executes(path, number):
    subprocess.run(["true"], check=True)


def leaves_a_file(path, number):
    path.with_name("half").write_bytes(b"half")


def takes_memory(path, number):
    np.ones(5 * 2**28, np.uint8)


def crashes(path, number):
    if number % 24 == 8:
        ctypes.string_at(0)


def hangs(path, number):
    if number == 2:
        time.sleep(100)


BAD = {
    function.__name__: function
    for function in (
        *(refuses, reads_nothing, names_no_file, raises_another_error, executes),
        *(leaves_a_file, takes_memory, crashes),
    )
}
HANGING = {"hangs": hangs}
OUTCOMES = {
    "refuses": "refused",
    "reads_nothing": "read",
    "names_no_file": "FAILED",
    "raises_another_error": "FAILED",
    "executes": "FAILED",
    "leaves_a_file": "half-written",
    "takes_memory": "memory",
    "crashes": "read",
}


@pytest.mark.slow
def test_every_kind_of_failure_is_noticed_and_kept(tmp_path):
    for kind in BAD:
        Sample(kind, "x", {"x": bytes(range(100))}).write(tmp_path / "samples" / kind / "x")
    result = fuzz(tmp_path, seed=3, count=8 * len(BAD), workers=2, readers="tests.test_fuzz:BAD")
    kinds = sorted(BAD)
    for kind, wanted in OUTCOMES.items():
        outcomes = {outcome for found, outcome in result.counts if found == f"{kind} x"}
        assert outcomes == {wanted} | ({"crash"} if kind == "crashes" else set())
    assert {message for *_, outcome, message in result.failures if outcome == "crash"} == {"SIGSEGV"}
    samples = read_samples(tmp_path / "samples")
    assert [sample.kind for sample in samples] == kinds
    for number, *_ in result.failures:
        kept = tmp_path / "failures" / f"seed3-{number}"
        assert (kept / "x").read_bytes() == make_input(samples, 3, number).files["x"]
    assert len(list((tmp_path / "failures").iterdir())) == len({number for number, *_ in result.failures})


def test_an_input_that_hangs_is_stopped_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.PATIENCE", 2)
    Sample("hangs", "x", {"x": b"0"}).write(tmp_path / "samples" / "hangs" / "x")
    result = fuzz(tmp_path, seed=0, count=9, workers=1, readers="tests.test_fuzz:HANGING")
    assert [(number, outcome) for number, _, outcome, _ in result.failures] == [(2, "hang")]
    assert result.counts["hangs x", "read"] >= 8


def test_inputs_are_made_by_seed_and_number_alone():
    data = {"a.json": b'{"a": [1, 2, {"b": null}], "c": "d"}', "b.bin": bytes(range(256)) * 4}
    samples = [Sample("checkpoint", name, data) for name in data]
    made = [make_input(samples, 7, number) for number in range(300)]
    assert made == [make_input(samples, 7, number) for number in range(300)]
    assert made != [make_input(samples, 8, number) for number in range(300)]
    changed = Counter(name for one in made for name in data if one.files[name] != data[name])
    assert min(changed.values()) > 90
    assert len({one.files["b.bin"] for one in made}) > 100


@pytest.mark.slow
def test_no_mutated_file_does_harm(tmp_path):
    pytest.importorskip("av", reason="clips need PyAV")
    make_samples(tmp_path / "samples")
    samples = read_samples(tmp_path / "samples")
    assert len(samples) > 30
    result = fuzz(tmp_path, seed=0, count=10_000, workers=os.cpu_count() or 1)
    assert result.failures == []
    assert result.counts.total() >= 10_000
    read = {kind.split()[1] for kind, outcome in result.counts if outcome == "read"}
    assert {sample.name for sample in samples} - read == NEVER_READ
