"""Checkpoint directories and files: what is read, what is refused, and what is left on disk when writing fails."""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from flax_vae import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.io import checkpoint, port
from flax_vae.io.weights import DTYPES

hypothesis = pytest.importorskip("hypothesis", reason="arrays are drawn by hypothesis: pip install hypothesis")
hnp = pytest.importorskip("hypothesis.extra.numpy", reason="arrays are drawn by hypothesis: pip install hypothesis")
st = hypothesis.strategies

CONFIG = {"_class_name": "Anything", "widths": [3, 5]}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tensors(seed=0, names="abc") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {f"{name}.weight": generator.standard_normal((5, 3)).astype(np.float32) for name in names}


def write(path: Path, arrays: dict, config=CONFIG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, path)
    (path.parent / "config.json").write_text(json.dumps(config))
    return path


def write_shards(directory: Path, arrays: dict, stem="model") -> Path:
    """One file for every tensor."""
    names = {key: f"{stem}-{i:05d}-of-{len(arrays):05d}.safetensors" for i, key in enumerate(arrays, 1)}
    for key, name in names.items():
        write(directory / name, {key: arrays[key]})
    index = directory / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def read(path) -> dict[str, np.ndarray]:
    source = checkpoint.open_checkpoint(path)
    return {key: source.read(key) for key in source.shapes()}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


def refusal(path, kind: type[Exception] = ValueError) -> str:
    before = sorted(Path(path).parent.rglob("*"))
    with pytest.raises(kind) as caught:
        read(path)
    assert sorted(Path(path).parent.rglob("*")) == before
    return str(caught.value)


# Reading


@pytest.mark.parametrize("name", [WEIGHTS, "model.safetensors", "anything at all.safetensors"])
def test_directory_and_single_file_give_the_same(tmp_path, name):
    path = write(tmp_path / name, tensors())
    for place in (tmp_path, str(tmp_path), path, str(path)):
        assert same(read(place), tensors())
        source = checkpoint.open_checkpoint(place)
        assert source.config() == CONFIG
        assert source.shapes() == dict.fromkeys(tensors(), ((5, 3), "float32"))


def test_a_subfolder_is_opened_and_a_missing_one_is_an_error_that_names_both(tmp_path):
    write(tmp_path / WEIGHTS, tensors(1))
    write(tmp_path / "vae" / WEIGHTS, tensors(), CONFIG | {"inner": True})
    source = checkpoint.open_checkpoint(tmp_path, "vae")
    assert source.config()["inner"]
    assert same({key: source.read(key) for key in source.shapes()}, tensors())
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no folder unet"):
        checkpoint.open_checkpoint(tmp_path, "unet")
    with pytest.raises(FileNotFoundError, match="has no folder vae"):
        checkpoint.open_checkpoint(tmp_path / WEIGHTS, "vae")


@pytest.mark.parametrize("stem", ["model", "other"])
def test_shards_are_read_through_their_index(tmp_path, stem):
    index = write_shards(tmp_path, tensors(), stem)
    assert same(read(tmp_path), tensors())
    assert same(read(index), tensors())


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ([WEIGHTS, "model.safetensors", "zero.safetensors"], 0),
        (["zero.safetensors", "model.safetensors"], 1),
        (["model.safetensors", "model.fp16.safetensors"], 0),
        (["._model.safetensors", "zero.safetensors"], 1),
    ],
)
def test_usual_name_is_taken_where_there_are_several(tmp_path, names, taken):
    for seed, name in enumerate(names):
        write(tmp_path / name, tensors(seed))
    assert same(read(tmp_path), tensors(taken))


def test_safetensors_are_taken_before_pickles(tmp_path):
    write(tmp_path / "some.safetensors", tensors())
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.pt"):
        (tmp_path / name).write_bytes(b"never looked at")
    assert same(read(tmp_path), tensors())


def test_weights_that_nothing_tells_apart_are_refused_by_name(tmp_path):
    write(tmp_path / "first.safetensors", tensors())
    write(tmp_path / "second.safetensors", tensors())
    message = refusal(tmp_path)
    assert "first.safetensors, second.safetensors" in message
    write_shards(tmp_path, tensors())
    assert same(read(tmp_path), tensors())  # the usual name
    write(tmp_path / "model.safetensors", tensors(1))
    assert "model.safetensors, model.safetensors.index.json" in refusal(tmp_path)


def test_integers_beside_the_weights_do_not_hinder_opening(tmp_path):
    path = write(tmp_path / WEIGHTS, tensors() | {"steps": np.array(3)})
    source = checkpoint.open_checkpoint(path)
    assert source.shapes()["steps"] == ((), "I64")


def test_missing_config_says_what_to_do(tmp_path):
    write(tmp_path / WEIGHTS, tensors())
    (tmp_path / "config.json").unlink()
    source = checkpoint.open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="pass a config"):
        source.config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty"),
        (b"{'single': 'quotes'}", "JSON"),
        (b"[1, 2]", "list"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"a":' * 200_000, "JSON"),
        (b'"\xff"', "JSON"),
    ],
)
def test_config_that_is_no_json_object_is_refused(tmp_path, text, said):
    write(tmp_path / WEIGHTS, tensors())
    (tmp_path / "config.json").write_bytes(text)
    source = checkpoint.open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        source.config()
    assert str(tmp_path / "config.json") in str(caught.value)


def test_huge_json_is_not_read(tmp_path):
    write(tmp_path / WEIGHTS, tensors())
    os.truncate(tmp_path / "config.json", 2**40)
    source = checkpoint.open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes"):
        source.config()


# Damaged and hostile files


def framed(header: bytes | dict, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = safetensors.numpy.save(tensors())
DAMAGED = {
    "empty": (b"", "empty file"),
    "cut in the data": (GOOD[:-7], "in part"),
    "cut in the header": (GOOD[:50], "in part"),
    "cut in the length": (GOOD[:5], "safetensors"),
    "followed by more": (GOOD + b"more", "safetensors"),
    "header of 10 GB": (struct.pack("<Q", 10**10) + GOOD[8:], "10,000,000,000"),
    "header of 90 MB that is not there": (struct.pack("<Q", 90 * 10**6) + GOOD[8:], "90,000,000"),
    "nested header": (framed(b'{"a":' * 100_000), "JSON"),
    "header that is a list": (framed(b"[1, 2]"), "JSON"),
    "header that is no text": (framed(b'{"\xff": 1}'), "UTF-8"),
    "data that overlaps": (framed({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)), "safetensors"),
    "data outside of the file": (framed({"a": entry([4], [0, 16])}, bytes(8)), "safetensors"),
    "size beyond all bounds": (framed({"a": entry([2**40, 2**40], [0, 4])}, bytes(4)), "safetensors"),
    "shape that belies the size": (framed({"a": entry([3], [0, 4])}, bytes(4)), "safetensors"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "zip, as torch writes": (b"PK\x03\x04" + bytes(100), ".bin, .pt, .pth"),
    "pickle": (pickle.dumps({"a": [1.0] * 30}), ".bin, .pt, .pth"),
    "text": (b"just some words, long enough for a header", "something else"),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_or_mislabelled_safetensors_are_refused_with_the_reason(tmp_path, content, said):
    path = tmp_path / WEIGHTS
    path.write_bytes(content)
    for place in (path, tmp_path):
        message = refusal(place)
        assert str(path) in message
        assert said.lower() in message.lower()


@pytest.mark.parametrize(
    "name",
    [
        *[
            "../outside.safetensors",
            "/etc/passwd",
            "sub/x.safetensors",
            "..",
            "",
            ".hidden.safetensors",
            "a\\b.safetensors",
        ],
        *[
            "C:x.safetensors",
            "a\0.safetensors",
            "model.safetensors.index.json",
            "notes.txt",
            3,
            None,
            ["x"],
            {"x": "y"},
        ],
    ],
)
def test_index_may_only_name_weights_in_its_own_directory(tmp_path, name):
    write(tmp_path / "outside.safetensors", tensors())
    write(tmp_path / "in" / "sub" / "x.safetensors", tensors())
    write(tmp_path / "in" / "notes.txt", tensors())
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": name}}))
    assert str(index) in refusal(tmp_path / "in")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 200_000, "<html>"])
def test_index_that_is_no_index_is_refused(tmp_path, text):
    index = write_shards(tmp_path, tensors())
    index.write_text(text)
    assert str(index) in refusal(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    index = write_shards(tmp_path, tensors())
    names = json.loads(index.read_text())["weight_map"]
    write(tmp_path / names["b.weight"], tensors(names="bd"))
    write(tmp_path / names["c.weight"], tensors(names="e"))
    message = refusal(tmp_path)
    for astray in ("c.weight in model-00003", "d.weight in model-00002", "e.weight in model-00003"):
        assert astray in message
    assert "a.weight" not in message
    (tmp_path / names["a.weight"]).unlink()
    assert f"{index} names files that are not beside it, fetch them too: {names['a.weight']}" in refusal(tmp_path)


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"anything")
    assert f"{path} is no weights file: expected one named *.safetensors, *.bin, *.pt, *.pth, *.ckpt," in refusal(path)
    assert "no weights" in refusal(tmp_path, FileNotFoundError)


# Writing


ARRAYS = st.dictionaries(
    st.text(max_size=8),
    st.sampled_from(list(DTYPES)).flatmap(
        lambda dtype: hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)).map(
            lambda bits: np.resize(bits, (*bits.shape, np.dtype(dtype).itemsize)).view(dtype)[..., 0]
        )
    ),
    max_size=6,
)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
@hypothesis.given(ARRAYS)
def test_what_is_saved_is_what_the_library_reads(tmp_path, arrays):
    arrays.pop("__metadata__", None)
    checkpoint.save(tmp_path, CONFIG, port.Arrays(arrays))
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(arrays)
    found = read(tmp_path)
    assert {key: (x.dtype, x.shape, x.tobytes()) for key, x in found.items()} == {
        key: (x.dtype, x.shape, x.tobytes()) for key, x in arrays.items()
    }


def test_strided_tensors_are_saved_as_they_look(tmp_path):
    base = np.arange(60.0, dtype=np.float32)
    arrays = {"every other": base[::2], "backwards": base[::-1], "transposed": base.reshape(3, 4, 5).transpose(2, 0, 1)}
    checkpoint.save(tmp_path, CONFIG, port.Arrays(arrays))
    assert same(read(tmp_path), arrays)


def test_saved_tensors_are_aligned(tmp_path):
    arrays = {f"{i}": np.zeros(3, dtype) for i, dtype in enumerate(["float16", "float64", "bfloat16", "float32"])}
    checkpoint.save(tmp_path, CONFIG, port.Arrays(arrays))
    raw = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[key]["data_offsets"][0] % array.itemsize == 0 for key, array in arrays.items())


def test_saving_makes_parents_and_replaces_what_was_saved_before(tmp_path):
    target = tmp_path / "some" / "where"
    for seed in (0, 1):
        checkpoint.save(target, CONFIG | {"seed": seed}, port.Arrays(tensors(seed)))
        assert same(read(target), tensors(seed))
        assert json.loads((target / "config.json").read_text())["seed"] == seed
        assert sorted(os.listdir(target)) == ["config.json", WEIGHTS]


class Failing(port.Arrays):
    def __init__(self, arrays, error):
        super().__init__(arrays)
        self.error = error

    def read(self, key):
        if key == "c.weight":
            raise self.error
        return super().read(key)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), ValueError("bad")])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_no_part_and_an_old_checkpoint_whole(tmp_path, error, existing):
    if existing:
        checkpoint.save(tmp_path, CONFIG, port.Arrays(tensors(7)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(type(error)):
        checkpoint.save(tmp_path, {"new": True}, Failing(tensors(), error))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_gets_its_name_last(tmp_path, monkeypatch):
    replaced, replace = [], os.replace

    def record(source, target):
        assert all(path.stat().st_size for path in tmp_path.iterdir())
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    checkpoint.save(tmp_path, CONFIG, port.Arrays(tensors()))
    assert replaced == [WEIGHTS, "config.json"]


def test_file_in_the_place_of_the_directory_is_refused_and_kept(tmp_path):
    (tmp_path / "taken").write_text("precious")
    with pytest.raises(NotADirectoryError, match="taken is a file"):
        checkpoint.save(tmp_path / "taken", CONFIG, port.Arrays(tensors()))
    assert (tmp_path / "taken").read_text() == "precious"


@pytest.mark.parametrize("name", ["model.safetensors", f"{WEIGHTS}.index.json", "x-00001-of-00002.safetensors"])
def test_other_weights_that_would_stay_beside_the_new_ones_are_refused(tmp_path, name):
    (tmp_path / name).write_text("other weights")
    with pytest.raises(ValueError, match=name):
        checkpoint.save(tmp_path, CONFIG, port.Arrays(tensors()))
    assert os.listdir(tmp_path) == [name]


def test_what_is_no_weight_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="steps in int64"):
        checkpoint.save(tmp_path / "new", CONFIG, port.Arrays(tensors() | {"steps": np.arange(3)}))
    assert not (tmp_path / "new").exists()


# The model


def test_saved_model_loads_to_the_same_model(tmp_path):
    vae = nnx.eval_shape(lambda: CausalVideoVAE(CausalVideoVAEConfig.tiny(), rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(0)
    shapes = port.named_tensors(vae).shapes()
    weights = {key: generator.standard_normal(shape).astype(np.float32) / 9 for key, (shape, _) in shapes.items()}
    port.load(vae, port.Arrays(weights))
    vae.save_pretrained(tmp_path)
    assert same(read(tmp_path), weights)
    loaded = CausalVideoVAE.from_pretrained(tmp_path)
    assert loaded.config == vae.config
    assert same(port.torch_layout(loaded), weights)
    (tmp_path / "config.json").unlink()
    half = CausalVideoVAE.from_pretrained(tmp_path / WEIGHTS, dtype=np.float16, config=CausalVideoVAEConfig.tiny())
    assert same(port.torch_layout(half), {key: array.astype(np.float16) for key, array in weights.items()})


MEASURE = """
import re, sys
import jax
import jax.numpy as jnp
from flax_vae import CausalVideoVAE

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])

jax.block_until_ready(jnp.zeros(1))
before = peak()
vae = CausalVideoVAE.from_pretrained(sys.argv[1], dtype=sys.argv[2])
print(peak() - before)
vae.save_pretrained(sys.argv[3])
print(peak() - before)
"""


class Random:
    """Tensors that are drawn when they are read."""

    def __init__(self, shapes):
        self._shapes, self.origin = shapes, "drawn"

    def shapes(self):
        return self._shapes

    def read(self, key):
        shape, dtype = self._shapes[key]
        return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_model_is_ported_in_less_than_one_and_a_half_times_its_size(tmp_path, dtype):
    vae = nnx.eval_shape(lambda: CausalVideoVAE(CausalVideoVAEConfig.released(), rngs=nnx.Rngs(0)))
    shapes = port.named_tensors(vae).shapes()
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, _ in shapes.values())
    checkpoint.save(tmp_path / "in", vae.config.to_dict(), Random(shapes))
    try:
        root = Path(checkpoint.__file__).parents[2]
        command = [sys.executable, "-c", MEASURE, tmp_path / "in", dtype, tmp_path / "out"]
        environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for path in tmp_path.rglob("*.safetensors"):
            path.unlink()
    loading, saving = (int(line) / size for line in result.stdout.split())
    assert 1.0 <= loading <= 1.5
    assert saving <= 1.5
