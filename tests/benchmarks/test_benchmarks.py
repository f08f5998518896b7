"""The speed benchmark's arithmetic, and what becomes of ways that fail; nothing of it is measured here."""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as benchmark
from benchmarks import figures, speed_report
from benchmarks.options import frames_and_pixels
from benchmarks.speed import OURS, Failed, Row, Worker, best_torch, compared, ratio, seconds
from benchmarks.speed_report import Found
from flax_vae.ops.lowering import convolve
from flax_vae.ops.window import Window, lowered

ROW = Row("small", "float32", "encode", 9, 64)
READY = {"took": {"trace": 1.0, "compile": 2.0, "first": 3.0}, "outcome": [[1]], "memory": {"above": 2**20}}


class Scripted:
    """Answers with what it is given, and notes that it was asked."""

    def __init__(self, name, times, log, ready=READY):
        self.name, self.times, self.log, self.ready = name, iter(times), log, ready

    def answer(self):
        if "error" in self.ready:
            raise Failed(f"{self.name}: {self.ready['error']}")
        return self.ready

    def go(self):
        self.log.append(self.name)
        return next(self.times)

    def close(self):
        self.log.append(f"{self.name} is closed")


@pytest.fixture
def measured():
    """Returns a function of the seconds of each way: what is measured, and who did what."""

    def run(rounds, times, ready={}, free=None):  # noqa: B006
        log = []

        def start(way):
            return Scripted(way, times.get(way, ()), log, ready.get(way, READY))

        others = [way for way in {**times, **ready} if way != OURS]
        return compared(others, rounds, start, lambda text: None, free), log

    return run


def test_ratio_is_the_median_of_ratios_within_a_round(measured):
    found, _ = measured(3, {OURS: [1.0, 2.0, 4.0], "eager": [3.0, 2.0, 20.0]})
    assert found["eager"]["pairs"] == [(1.0, 3.0), (2.0, 2.0), (4.0, 20.0)]
    assert ratio(found, "eager") == 3.0
    assert (seconds(found, OURS), seconds(found, "eager")) == (2.0, 3.0)


def test_ways_take_turns_and_no_more_than_two_live(measured):
    _, log = measured(2, {OURS: [1.0] * 4, "eager": [1.0] * 2, "plain": [1.0] * 2})
    turns = [[OURS, way, way, OURS, f"{way} is closed"] for way in ("eager", "plain")]
    assert log == [*turns[0], *turns[1], f"{OURS} is closed"]


def test_best_torch_is_the_fastest_in_torch(measured):
    found, _ = measured(1, {OURS: [1.0] * 3, "eager": [3.0], "compile": [2.0], "plain": [0.5]})
    assert best_torch(found) == "compile"


@pytest.mark.parametrize(
    ("ready", "free", "reason"),
    [
        ({"error": "no compiler"}, 2**30, "compile: no compiler"),
        ({**READY, "outcome": [[2]]}, 2**30, "another task"),
        (READY, 2**10, "more memory than is free"),
    ],
)
def test_way_that_fails_is_a_dash_with_a_reason(measured, ready, free, reason):
    found, log = measured(1, {OURS: [1.0]}, {"compile": ready}, lambda: free)
    row = Found(ROW, 1e9, found)
    assert speed_report.speed_line(row, ["compile"], 2e9) == "| encode, 9x64 | 1 | 1 | 50% | - | - |"
    assert reason in speed_report.reasons([row])
    assert log[-2:] == [OURS, f"{OURS} is closed"]  # and ours is timed alone


def test_where_ours_fails_nothing_else_is_measured(measured):
    found, log = measured(1, {"eager": [1.0]}, {OURS: {"error": "not run: too large"}})
    row = Found(ROW, 1e9, found)
    assert speed_report.speed_line(row, ["eager"], 2e9) == "| encode, 9x64 | - | - | - | - | - |"
    assert "flax_vae: not run: too large" in speed_report.reasons([row])
    assert speed_report.cost_table([row]).endswith("| encode, 9x64 | - | - | - | - | - | - | - |")
    assert log == [f"{OURS} is closed"]


def test_tables_name_the_best_torch_and_its_memory(measured):
    found, _ = measured(2, {OURS: [1.0] * 4, "eager": [2.0, 4.0], "plain": [8.0, 8.0]})
    row = Found(ROW, 1e9, found)
    wanted = "| encode, 9x64 | 1 | 1 | 50% | **3.00** (2.00 to 4.00), eager | 3.00 | 8.00 |"
    assert speed_report.speed_line(row, ["eager", "plain"], 2e9) == wanted
    assert speed_report.cost_table([row]).endswith("| encode, 9x64 | 1 | 1 | - | - | 3 | 3 | - |")
    assert speed_report.verdict([row]).endswith("1 of 1 rows.")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "eager: its process was killed"),
        ("import os; input(); os._exit(3)", "eager: its process ended with exit code 3"),
        ('input(); print(\'{"error": "no luck"}\')', "eager: no luck"),
    ],
)
def test_process_that_dies_says_why_and_hangs_nobody(program, reason, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        process = Worker("eager", [sys.executable, "-S", "-c", program], log)
        with pytest.raises(Failed, match=reason):
            process.go()
        process.close()


@pytest.mark.parametrize("size", ["9", "8x64", "9x60", "9x8", "9x-64", "ax64"])
def test_sizes_that_no_model_takes_are_refused(size):
    with pytest.raises(SystemExit, match=r"--size .*as 9x64"):
        frames_and_pixels(size, "--size")


def test_every_task_is_measured_at_every_size():
    options = benchmark.Options(presets=("tiny",), sizes=("9x64", "17x128"), jobs=("encode", "train"))
    rows = list(benchmark.rows_of(options))
    assert [(row.task, row.frames, row.size) for row in rows] == [
        (task, *size) for task in ("encode", "train") for size in ((9, 64), (17, 128))
    ]
    assert {row.precision for row in rows} == {"float32"}


def test_flops_are_those_of_products_with_pixels_alone():
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 8, 8, 4), (3, 3, 3, 4, 5)))
    with lowered("plain"):
        window = Window((1, 1, 1), ((2, 0), (1, 1), (1, 1)))
        analysis = jax.jit(lambda x, kernel: convolve(x, kernel, window)).lower(x, kernel).cost_analysis()
    along_time, along_height = 1 + 2 + 3, 2 + 6 * 3 + 2  # taps that see a frame, or a row, of all outputs
    assert analysis is not None
    assert analysis["flops"] == 2 * along_time * along_height**2 * 4 * 5


def test_the_page_of_figures_is_what_its_measurements_give(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    shutil.copytree(docs / "speed", tmp_path / "speed")
    figures.main(tmp_path / "speed", tmp_path / "figures.md")
    assert (tmp_path / "figures.md").read_text() == (docs / "figures.md").read_text()
