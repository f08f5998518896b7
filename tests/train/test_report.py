"""What is kept of shown clips while a run trains, and the report that is drawn of any run, whatever it has left."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="pictures need PyAV")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from flax_vae import to_float, to_uint8
from flax_vae.metrics.psnr import psnr
from flax_vae.train import curves
from flax_vae.train.config import PRESETS
from flax_vae.train.history import History, Snapshot, read_columns, read_history, save_snapshot
from flax_vae.train.report import duration, numbers, settings, spread_out, title, write_report

GAN = ("gan", "gan_weight", "discriminator", "logits_real", "logits_fake", "discriminator_gradient_norm")
PLAIN = ("mse", "l1", "kl", "total", "gradient_norm", "learning_rate", "frames_per_second", "waited")


def clips(count, frames, height=16, width=24, seed=0):
    """Clips of blocks of colour, in [-1, 1], and the same with noise."""
    random = np.random.default_rng(seed)
    blocks = random.integers(40, 216, (count, frames, height // 8, width // 8, 3), np.uint8).repeat(8, 2).repeat(8, 3)
    shown = to_float(blocks)
    return shown, shown + 0.2 * random.standard_normal(shown.shape, np.float32)


def lines(steps, names=PLAIN, begin=0, skipped=(), seed=0):
    """Metrics of a run in which the columns `names` begin at a step, and are NaN where steps were skipped."""
    values = np.exp(np.random.default_rng(seed).normal(-2, 0.5, (steps, len(names))))
    for step in range(steps):
        there = names if step >= begin else PLAIN
        row = {name: math.nan if step in skipped else values[step, i] for i, name in enumerate(names) if name in there}
        yield {"step": step, **row, "skipped": float(step in skipped)}


@pytest.fixture
def no_sheets(monkeypatch):
    """Has no contact sheet drawn, which is quicker, but listed."""
    drawn = []
    monkeypatch.setattr("flax_vae.train.history.contact_sheet", lambda *args: drawn.append(args))
    return drawn


@pytest.fixture
def run(tmp_path, no_sheets):
    """Returns a function that leaves a run in a folder: its config, metrics, and pictures of some steps."""

    def leave(metrics, preset="tiny", pictures=(), shown=(2, 3), after=""):
        config = {**dataclasses.asdict(PRESETS[preset]), "source": "/data/a $x^$ folder"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        text = "".join(json.dumps(line) + "\n" for line in metrics)
        (tmp_path / "metrics.jsonl").write_text(text + after)
        for step in pictures:
            save_snapshot(tmp_path, step, *clips(*shown))
        return tmp_path

    return leave


def history(snapshots=(), **columns):
    return History("run", {}, {name: np.array(values, float) for name, values in columns.items()}, list(snapshots))


def at(step, quality=20.0):
    return Snapshot(step, quality, 1, Path())


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (7, 2)])
def test_kept_frames_are_the_middle_ones_to_the_bit(tmp_path, shape, no_sheets):
    shown, output = clips(*shape)
    quality = save_snapshot(tmp_path, 1200, shown, output)
    assert quality == pytest.approx(psnr(shown, np.clip(output, -1, 1)), abs=1e-5)
    (snapshot,) = read_history(tmp_path).snapshots
    assert (snapshot.step, snapshot.psnr, snapshot.clips) == (1200, quality, shape[0])
    for pixels, clip in zip(snapshot.read(), (shown, output), strict=True):
        np.testing.assert_array_equal(pixels, to_uint8(clip[:, shape[1] // 2]))


def test_a_sheet_is_kept_and_nothing_is_left_beside_it(tmp_path, contents):
    save_snapshot(tmp_path, 5, *clips(2, 3))
    names = ["pictures/00000005.png", "pictures/frames/00000005.json", "pictures/frames/00000005.png"]
    assert list(contents(tmp_path)) == names


def test_picture_of_a_step_done_twice_is_replaced(tmp_path, no_sheets, contents):
    first = save_snapshot(tmp_path, 5, *clips(2, 3, seed=1)), contents(tmp_path)
    assert save_snapshot(tmp_path, 5, *clips(2, 3, seed=2)) != first[0]
    assert (save_snapshot(tmp_path, 5, *clips(2, 3, seed=1)), contents(tmp_path)) == first


def test_contact_sheet_has_frames_of_every_clip_by_their_places(tmp_path, no_sheets):
    shown, output = clips(2, 9)
    quality = save_snapshot(tmp_path, 1200, shown, output)
    (_, before, after, heading, places, whole) = no_sheets[0]
    assert (heading, places, whole) == ("step 1,200, 2 clips", [0, 4, 8, 0, 4, 8], quality)
    np.testing.assert_array_equal(before, to_uint8(shown[:, [0, 4, 8]]).reshape(6, *shown.shape[2:]))
    np.testing.assert_array_equal(after, to_uint8(output[:, [0, 4, 8]]).reshape(6, *shown.shape[2:]))


def test_a_reconstruction_that_is_not_a_number_is_refused(tmp_path, no_sheets):
    shown, output = clips(1, 2)
    output[0, 1, 3, 3, 0] = np.nan
    with pytest.raises(ValueError, match="frames hold NaN"):
        save_snapshot(tmp_path, 5, shown, output)
    assert read_history(tmp_path).snapshots == []


def test_columns_have_nan_where_lines_have_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": NaN, "b": 2}\n{"b": null, "c": 5}\n{"a": 4}\n{"a": 5, "b"')
    nan = math.nan
    columns = read_columns(path)
    assert list(columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(columns["a"], [1, nan, nan, 4])
    np.testing.assert_array_equal(columns["b"], [nan, 2, nan, nan])
    np.testing.assert_array_equal(columns["c"], [nan, nan, 5, nan])
    assert read_columns(tmp_path / "none") == {}


def test_psnr_of_batches_is_that_of_their_mse(run):
    shown, output = clips(1, 2)
    folder = run([{"step": 0, "mse": float(np.mean((shown - output) ** 2))}, {"step": 1, "mse": 0.0}])
    np.testing.assert_allclose(read_history(folder).metrics["psnr"], [psnr(shown, output), math.inf], rtol=1e-5)


RUNS = {
    "not begun": (lambda run, folder: folder, 0),
    "of no step": (lambda run, folder: run([]), 0),
    "cut off in its first line": (lambda run, folder: run([], after='{"step": 0, "ms'), 0),
    "of one step": (lambda run, folder: run(lines(1), pictures=[0, 1]), 7),
    "of two steps": (lambda run, folder: run(lines(2), "stage1", pictures=[0]), 7),
    "with a GAN from the middle on": (
        lambda run, folder: run(lines(90, (*PLAIN, "lpips", "r1", *GAN), 50, (7, 8)), "stage1", range(0, 91, 10)),
        11,
    ),
    "on images": (lambda run, folder: run(lines(50), pictures=[20, 40], shown=(4, 1)), 7),
    "that is never finite": (lambda run, folder: run(lines(9, skipped=range(9))), 0),
    "of pictures alone": (lambda run, folder: run([], pictures=[10]), 1),
    "of other columns": (lambda run, folder: run([{"step": 0, "other": 1.0}, {"step": 1, "kl": 0.0}]), 1),
    "of 100,000 steps": (lambda run, folder: run(lines(100_000, ("mse", "gradient_norm"), skipped=(5, 6))), 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_report_is_drawn_of_a_run(name, run, tmp_path, monkeypatch):
    from matplotlib.image import imread

    leave, panels = RUNS[name]
    folder, drawn, draw_panel = leave(run, tmp_path), [], curves.draw_panel
    monkeypatch.setattr(curves, "draw_panel", lambda *args: drawn.append(draw_panel(*args)))
    before = set(folder.iterdir())
    assert write_report(folder) == folder / "report.png"
    assert set(folder.iterdir()) - before == {folder / "report.png"}
    assert len(drawn) == panels
    pixels = imread(folder / "report.png")
    assert pixels.shape[1] == 1560
    assert pixels[..., :3].min() < 0.5
    assert (pixels[:, [0, -1], :3] == 1).all()


def test_report_shows_input_and_reconstructions_of_six_steps(run, monkeypatch):
    shown = []
    monkeypatch.setattr("flax_vae.io.page.Page.picture", lambda page, x, y, *rest: shown.append((y, x, rest[-1])))
    folder = run(lines(3), pictures=[0, 10, 20, 30, 40, 50, 60, 70, 80])
    words = []
    monkeypatch.setattr("flax_vae.io.page.Page.text", lambda page, x, y, text, **_: words.append((x, text)))
    write_report(folder)
    rows = [
        [pixels for y, _, pixels in sorted(shown, key=lambda one: one[:2]) if y == row]
        for row in sorted({y for y, *_ in shown})
    ]
    before, after = read_history(folder).snapshots[0].read()
    for row, x, y in zip(rows, before, after, strict=True):
        assert len(row) == 7
        np.testing.assert_array_equal(row[0], x)
        assert all((pixels == y).all() for pixels in row[1:])
    names = [text.split("\n")[0] for _, text in sorted(words) if text.startswith(("input", "step"))]
    assert names == ["input", *(f"step {step}" for step in (0, 10, 20, 30, 50, 80))]


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        ([], []),
        ([7], [7]),
        (range(1, 7), range(1, 7)),
        (range(0, 2001, 200), [0, 200, 400, 600, 1200, 2000]),
        (range(500, 100_001, 500), [500, 1000, 3000, 10_000, 31_500, 100_000]),
    ],
)
def test_steps_that_are_shown_are_ever_wider_apart(steps, chosen):
    assert [one.step for one in spread_out([at(step) for step in steps], 6)] == list(chosen)


def test_heading_says_what_was_trained_and_what_came_of_it(run):
    told = read_history(run(lines(60, skipped=(3, 4)), "stage1", pictures=[50]))
    assert title(told) == "pyramid-flow model, trained on a $x^$ folder"
    assert list(settings(told)) == [
        "60 of 100,000 steps",
        "8 clips of 17 frames, 256 \N{MULTIPLICATION SIGN} 256",
        "10% of the batches are 64 images",
        "GAN on frames from step 0",
        "bfloat16",
        "seed 0",
    ]
    told.metrics["seconds"] = np.full(60, 192.0)
    found = {words: number for words, number, _ in numbers(told)}
    assert found["PSNR of the clips below"] == f"{told.snapshots[-1].psnr:.2f} dB"
    assert found["training"] == "3 h 12 min"
    assert found["not finite and skipped, marked red"] == "2"


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (29, "29 s"), (30.1, "1 min"), (3599, "1 h 0 min")])
def test_duration_reads_well(seconds, words):
    assert duration(seconds) == words


def test_line_ignores_spikes_and_follows_the_first_fall():
    values = np.r_[np.geomspace(1, 0.01, 500), np.full(9500, 0.01)]
    values[::50] = np.nan
    values[1007::100] = 1e6
    places, line = curves.running_median(values)
    assert len(places) <= curves.MAX_MEDIANS
    assert line[0] > 0.7
    assert line.max() < 1
    np.testing.assert_allclose(line[20:], 0.01)
    np.testing.assert_array_equal(curves.running_median(np.array([3.0, math.nan, 1, 2]))[1], [3, 1, 2])


def test_of_many_points_the_least_and_greatest_are_drawn():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[70, 7_001, 70_003]] = [math.nan, 99, -99]
    chosen = curves.subsampled(values)
    assert {7_001, 70_003} <= set(chosen)
    assert curves.MAX_POINTS <= len(chosen) < curves.MAX_POINTS + 100
    assert 70 not in chosen
    assert list(curves.subsampled(values[69:72])) == [0, 2]


def draw(panel, told):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    curves.draw_panel(axes, panel, told)
    return axes


def panel(name):
    return next(panel for panel in curves.PANELS if name in {curve[0] for curve in panel.curves})


def test_far_points_do_not_flatten_a_curve_and_batches_of_images_stay_in_sight():
    random = np.random.default_rng(0)
    speeds = np.where(np.arange(1000) % 10, 20, 60) + random.normal(size=1000)
    axes = draw(panel("frames_per_second"), history(step=range(1000), frames_per_second=speeds))
    assert axes.get_ylim()[0] == 0
    assert 62 < axes.get_ylim()[1] < 75
    norms = np.exp(random.normal(size=1000))
    norms[500] = 1e12
    axes = draw(panel("gradient_norm"), history(step=range(1000), gradient_norm=norms))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] < 1e4


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 2, 3], "linear"), ([1, 10, 100], "log"), ([0, 0, 9], "linear"), ([-1, 10, 99], "linear")]
)
def test_a_log_scale_is_for_wide_ranges_above_zero(values, scale):
    assert draw(panel("kl"), history(step=range(3), kl=values)).get_yscale() == scale


def test_psnr_of_shown_clips_is_among_those_of_batches_and_skipped_steps_are_marked():
    told = history([at(0, 10), at(4, 30)], step=range(4), psnr=[9, math.nan, 12, 15], skipped=[0, 1, 0, 0])
    axes: Any = draw(panel("psnr"), told)
    points, line, shown = axes.lines
    np.testing.assert_array_equal(points.get_xydata(), [[0, 9], [2, 12], [3, 15]])
    np.testing.assert_array_equal(line.get_xydata(), [[0, 9], [2, 12], [3, 15]])
    np.testing.assert_array_equal(shown.get_xydata(), [[0, 10], [4, 30]])
    lines, legend = axes.collections[0], axes.get_legend()
    assert [segment[0][0] for segment in lines.get_segments()] == [1]
    assert [text.get_text() for text in legend.get_texts()] == ["training batches", "clips above"]


def test_a_perfect_reconstruction_is_kept_as_json_can_hold_it(tmp_path, no_sheets):
    shown, _ = clips(1, 2)
    assert save_snapshot(tmp_path, 5, shown, shown) == 100
    (snapshot,) = read_history(tmp_path).snapshots
    assert snapshot.psnr == 100
