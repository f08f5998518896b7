"""PSNR against its formula, and contact sheets against the pixels they show."""

import math

import numpy as np
import pytest

from flax_vae.io.pixels import to_float
from flax_vae.metrics.contact_sheet import contact_sheet
from flax_vae.metrics.psnr import pooled_psnr, psnr

matplotlib = pytest.importorskip("matplotlib", reason="contact sheets need matplotlib: pip install matplotlib")


def clip(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def flat(frames, height, width, colour):
    return np.broadcast_to(np.array(colour, np.uint8), (frames, height, width, 3))


def draw(folder, *arguments, **options):
    from matplotlib.image import imread

    contact_sheet(folder / "sheet.png", *arguments, **options)
    assert [path.name for path in folder.iterdir()] == ["sheet.png"]
    return (imread(folder / "sheet.png")[..., :3] * 255).round().astype(int)


def boxes(sheet, colour):
    """(top, bottom, left, right) around a colour, and how many separate runs it makes on its middle line."""
    where = np.abs(sheet - colour).max(-1) <= 1
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    line = where[(rows[0] + rows[-1]) // 2].astype(int)
    return (rows[0], rows[-1], columns[0], columns[-1]), int((np.diff(line, prepend=0) == 1).sum())


@pytest.mark.parametrize("shape", [(5, 7), (7, 9, 3), (3, 7, 9, 3), (2, 3, 7, 9, 3)])
def test_psnr_is_its_formula_and_the_same_for_uint8_and_float(shape):
    random = np.random.default_rng(1)
    a, b = (random.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
    error = ((a.astype(float) - b) ** 2).mean()
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    assert psnr(to_float(a), to_float(b)) == pytest.approx(psnr(a, b), abs=1e-4)
    assert psnr(a, a) == math.inf


def test_psnr_of_a_difference_of_one_level_is_48_db():
    a = clip(2, 8, 9) // 2
    assert psnr(a, a + 1) == pytest.approx(48.1308, abs=1e-3)


def test_psnr_of_a_clip_pools_the_errors_of_its_frames():
    a, b = clip(5, 8, 9, seed=1), clip(5, 8, 9, seed=2)
    b[1], b[3] = a[1], a[3] // 2
    assert pooled_psnr([psnr(x, y) for x, y in zip(a, b, strict=True)]) == pytest.approx(psnr(a, b), abs=1e-9)
    assert pooled_psnr([math.inf, math.inf]) == math.inf


@pytest.mark.parametrize(
    ("a", "b"),
    [(clip(2, 8, 9), clip(2, 8, 8)), (clip(2, 8, 9), to_float(clip(2, 8, 9))), (clip(0, 8, 9), clip(0, 8, 9))],
)
def test_psnr_of_unlike_arrays_is_refused(a, b):
    with pytest.raises(ValueError, match="give one shape and one dtype"):
        psnr(a, b)


def test_rows_are_input_reconstruction_and_amplified_difference(tmp_path):
    sheet = draw(tmp_path, flat(9, 40, 60, (200, 30, 30)), flat(9, 40, 60, (180, 30, 40)), title="costs $x^$")
    (top, bottom, left, right), count = boxes(sheet, (200, 30, 30))
    below, count_below = boxes(sheet, (180, 30, 40))
    last, count_last = boxes(sheet, (160, 0, 80))
    assert (count, count_below, count_last) == (6, 6, 6)
    assert top < bottom < below[0] < below[1] < last[0] < last[1]
    assert (left, right) == below[2:] == last[2:]


@pytest.fixture
def words(monkeypatch):
    """The words of the sheet, in the order in which they are written."""
    from matplotlib.figure import Figure

    words, write = [], Figure.text
    monkeypatch.setattr(
        Figure, "text", lambda figure, x, y, text, **style: words.append(text) or write(figure, x, y, text)
    )
    return words


def test_names_and_numbers_belong_to_the_frames_shown(tmp_path, words):
    a = clip(9, 30, 40) // 4
    b = a + np.arange(1, 10, dtype=np.uint8)[:, None, None, None]
    draw(tmp_path, a, b, title="A clip", columns=3)
    levels = [f"frame {index}\n{20 * math.log10(255 / (index + 1)):.2f} dB" for index in (0, 4, 8)]
    assert words[0] == "A clip"
    assert set(levels) < set(words)
    assert "difference \N{MULTIPLICATION SIGN}16" in words
    assert f"PSNR {psnr(a, b):.2f} dB over all" in words[1]
    assert "3 of 9 frames, 40" in words[1]


def test_samples_of_a_longer_clip_carry_its_numbers_and_its_psnr(tmp_path, words):
    a = clip(9, 30, 40) // 4
    b = a + np.arange(1, 10, dtype=np.uint8)[:, None, None, None]
    draw(tmp_path, a, b, numbers=range(0, 36, 4), quality=12.346, columns=3)
    assert {f"frame {4 * i}\n{20 * math.log10(255 / (i + 1)):.2f} dB" for i in (0, 4, 8)} < set(words)
    assert words[1].startswith("frames from 0 to 32, 40")
    assert words[1].endswith("PSNR 12.35 dB over the whole clip")


@pytest.mark.parametrize(("frames", "columns", "expected"), [(1, 6, 1), (2, 6, 2), (17, 4, 4), (3, 9, 3)])
def test_there_is_one_column_for_each_chosen_frame(tmp_path, frames, columns, expected):
    sheet = draw(tmp_path, flat(frames, 30, 60, (9, 99, 199)), flat(frames, 30, 60, (9, 99, 9)), columns=columns)
    assert boxes(sheet, (9, 99, 199))[1] == expected


def test_frames_are_chosen_evenly_from_first_to_last(tmp_path):
    shades = np.arange(21, dtype=np.uint8) * 12
    inputs = np.zeros((21, 30, 40, 3), np.uint8)
    inputs[..., 2] = shades[:, None, None]
    inputs[..., 0] = 255
    sheet = draw(tmp_path, inputs, np.zeros_like(inputs), columns=5)
    (top, *_), _ = boxes(sheet, (255, 0, 0))
    line = sheet[top + 20]
    shown = [value for red, green, value in line if red == 255 and green == 0]
    assert sorted(set(shown)) == [0, 60, 120, 180, 240]


def test_single_upright_picture_stands_beside_its_reconstruction(tmp_path):
    sheet = draw(tmp_path, flat(1, 90, 60, (200, 30, 30)), flat(1, 90, 60, (30, 200, 30)))
    first, second = boxes(sheet, (200, 30, 30))[0], boxes(sheet, (30, 200, 30))[0]
    assert first[:2] == second[:2]
    assert first[3] < second[2]


@pytest.mark.parametrize(("height", "width"), [(6, 600), (600, 6), (272, 640), (1, 1)])
def test_pictures_keep_their_shape_on_a_page_of_sensible_size(tmp_path, height, width):
    sheet = draw(tmp_path, flat(4, height, width, (200, 30, 30)), flat(4, height, width, (0, 200, 30)), columns=1)
    (top, bottom, left, right), _ = boxes(sheet, (200, 30, 30))
    assert max(sheet.shape) < 30000
    assert (bottom - top + 1) * width == pytest.approx((right - left + 1) * height, abs=3 * max(height, width))


def test_equal_clips_and_float_clips_can_be_drawn(tmp_path):
    frames = to_float(clip(3, 20, 30))
    assert np.array_equal(draw(tmp_path, frames, frames), draw(tmp_path, clip(3, 20, 30), clip(3, 20, 30)))


@pytest.mark.parametrize(
    ("name", "other", "options", "error", "message"),
    [
        ("sheet.jpg", clip(3, 8, 8), {}, ValueError, "end the name in .png"),
        ("sheet.png", clip(4, 8, 8), {}, ValueError, "expected .T, H, W, 3. twice"),
        ("sheet.png", clip(3, 8, 8).astype(int), {}, ValueError, "int64"),
        ("sheet.png", clip(3, 8, 8), {"columns": 0}, ValueError, "columns=0"),
        ("sheet.png", clip(3, 8, 8), {"numbers": [0, 4]}, ValueError, "2 numbers for 3 frames"),
        ("none/sheet.png", clip(3, 8, 8), {}, FileNotFoundError, "create it first"),
    ],
)
def test_what_cannot_be_drawn_leaves_no_file(tmp_path, name, other, options, error, message):
    with pytest.raises(error, match=message):
        contact_sheet(tmp_path / name, clip(3, 8, 8), other, **options)
    assert not list(tmp_path.iterdir())


def test_failure_while_saving_leaves_the_old_sheet(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(figure, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "sheet.png").write_bytes(b"the old one")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        contact_sheet(tmp_path / "sheet.png", clip(3, 8, 8), clip(3, 8, 8))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old one"]
