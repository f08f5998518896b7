"""Nested tuples of arrays in a file: what is read is what was written, to the bits, or an error that says why."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_vae.io.trees import TREE, load_tree, save_tree

hypothesis = pytest.importorskip("hypothesis", reason="trees are drawn by hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.usefixtures("float64")

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


@st.composite
def arrays(draw):
    """Draws any bits there are, those of infinities and of every kind of NaN too, in shapes with and without axes."""
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(st.lists(st.integers(0, 3), max_size=4))
    size = int(np.prod(shape)) * dtype.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


TREES = st.recursive(st.none() | arrays(), lambda nodes: st.lists(nodes, max_size=4).map(tuple), max_leaves=8)
TEXTS = st.dictionaries(st.text(max_size=8).filter(lambda key: key != TREE), st.text(max_size=8), max_size=3)


def check_same(tree, expected):
    if isinstance(expected, tuple):
        assert type(tree) is tuple
        for node, other in zip(tree, expected, strict=True):
            check_same(node, other)
    elif expected is None:
        assert tree is None
    else:
        assert (tree.shape, tree.dtype, tree.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


@settings(max_examples=60)
@given(tree=TREES, about=TEXTS)
def test_what_is_read_is_what_was_written_to_the_bits(tmp_path_factory, tree, about):
    path = tmp_path_factory.mktemp("trees") / "tree.safetensors"
    save_tree(path, tree, about)
    again, texts = load_tree(path)
    check_same(again, tree)
    assert texts == about


def test_arrays_of_jax_are_written_too(tmp_path):
    tree = (jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7, (), (jnp.float64(np.pi), None))
    save_tree(tmp_path / "tree", tree)
    check_same(load_tree(tmp_path / "tree")[0], jax.tree.map(np.asarray, tree))


@pytest.fixture
def saved(tmp_path):
    """A file of a tree, and the tree."""
    rng = np.random.default_rng(0)
    tree = (rng.normal(size=(1, 2, 3)).astype(np.float32), (None, (rng.normal(size=4), ())))
    save_tree(tmp_path / "tree.safetensors", tree, {"frames": "9"})
    return tmp_path / "tree.safetensors", tree


@pytest.mark.parametrize(
    "leaf", [1, 2.5, "text", [np.ones(2)], {"a": np.ones(2)}, np.ones(2, np.int32), np.ones(2, np.uint8)], ids=repr
)
def test_nothing_else_is_written_and_the_file_from_before_stays(saved, leaf):
    path, tree = saved
    with pytest.raises(ValueError, match=r"cannot be saved: expected tuples of floating-point arrays"):
        save_tree(path, (np.ones(3), (leaf,)))
    check_same(load_tree(path)[0], tree)
    assert os.listdir(path.parent) == [path.name]


def test_a_text_cannot_take_the_place_of_the_tree(saved):
    path, tree = saved
    with pytest.raises(ValueError, match=f"'{TREE}'"):
        save_tree(path, (np.ones(3),), {TREE: "oak"})
    check_same(load_tree(path)[0], tree)


def test_a_failure_in_writing_leaves_the_file_from_before(saved, monkeypatch):
    path, tree = saved

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("flax_vae.io.weights.Arrays.read", full)
    with pytest.raises(OSError, match="no space left"):
        save_tree(path, (np.ones(3),))
    monkeypatch.undo()
    check_same(load_tree(path)[0], tree)
    assert os.listdir(path.parent) == [path.name]


def test_a_file_cut_off_anywhere_is_refused_by_name(saved):
    path, _ = saved
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tree\.safetensors"):
            load_tree(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"tree\.safetensors"):
        load_tree(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        load_tree(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tree(tmp_path)


HOSTILE = {
    "no tree": None,
    "no json": "{",
    "empty": "",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep and cut off": "[" * 100_000,
    "a name that is not there": '["0", ["7"]]',
    "a number": "[0]",
    "truth": "true",
    "an object": '[{"0": "0"}]',
    "a long number": "[1" + "0" * 9000 + "]",
    "not a number": "[NaN]",
}


@pytest.mark.parametrize("tree", HOSTILE.values(), ids=HOSTILE)
def test_other_safetensors_are_refused_by_name(tmp_path, tree):
    path = tmp_path / "other.safetensors"
    save_file({"0": np.ones(3, np.float32)}, path, None if tree is None else {TREE: tree})
    with pytest.raises(ValueError, match=r"other\.safetensors: holds no tuples of arrays that flax_vae has written"):
        load_tree(path)


def test_a_header_with_more_than_texts_is_refused_by_name(tmp_path):
    path, header = tmp_path / "other.safetensors", json.dumps({"__metadata__": {TREE: ["0"]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        load_tree(path)
