"""Names of weights files: variants, shards and their indexes in every spelling, and which one a folder's is."""

import json

import numpy as np
import pytest
import safetensors.numpy

from flax_vae.io.checkpoint import open_checkpoint
from flax_vae.io.weights_files import parse

STEM = "diffusion_pytorch_model"
SPELLINGS = {  # shards and index: diffusers from 0.31 on, diffusers before, transformers
    "new": (f"{STEM}.fp16-0000{{}}-of-00002.safetensors", f"{STEM}.safetensors.index.fp16.json"),
    "old": (f"{STEM}-0000{{}}-of-00002.fp16.safetensors", f"{STEM}.safetensors.fp16.index.json"),
    "transformers": (f"{STEM}.fp16-0000{{}}-of-00002.safetensors", f"{STEM}.fp16.safetensors.index.json"),
}


def write(path, seed):
    """Writes one tensor that tells where it is from."""
    safetensors.numpy.save_file({"seed": np.full(1, seed, np.float32)}, path)


def write_shards(folder, spelling, seed):
    """Writes two shards and their index."""
    shard, index = SPELLINGS[spelling]
    for i, key in enumerate(("seed", "other"), 1):
        safetensors.numpy.save_file({key: np.full(1, seed, np.float32)}, folder / shard.format(i))
    weight_map = {"seed": shard.format(1), "other": shard.format(2)}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return folder / index


def seed(path, variant=None):
    return int(open_checkpoint(path, variant=variant).read("seed")[0])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.safetensors", ("model", None, ".safetensors", False)),
        ("model.fp16.bin", ("model", "fp16", ".bin", False)),
        ("model-00001-of-00002.safetensors", ("model", None, ".safetensors", False)),
        ("model.safetensors.index.json", ("model", None, ".safetensors", True)),
        *((shard.format(1), (STEM, "fp16", ".safetensors", False)) for shard, _ in SPELLINGS.values()),
        *((index, (STEM, "fp16", ".safetensors", True)) for _, index in SPELLINGS.values()),
        ("last.ckpt", ("last", None, ".ckpt", False)),
        ("config.json", None),
        ("model.safetensors.md", None),
        ("index.json", None),
    ],
)
def test_a_name_tells_stem_variant_suffix_and_index(name, told):
    assert parse(name) == told


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_shards_of_a_variant_are_read_through_an_index_of_every_spelling(tmp_path, spelling):
    index = write_shards(tmp_path, spelling, 3)
    for place in (tmp_path, index):
        assert seed(place) == 3
        assert sorted(open_checkpoint(place).shapes()) == ["other", "seed"]
    write(tmp_path / f"{STEM}.safetensors", 1)
    assert seed(tmp_path) == 1
    assert seed(tmp_path, "fp16") == 3


@pytest.mark.parametrize(
    ("names", "variant", "taken"),
    [
        (["model.fp16.safetensors", "model.safetensors"], None, 1),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", 0),
        (["model.ema.safetensors", "model.fp16.safetensors"], "fp16", 1),
        ([f"{STEM}.fp16.safetensors", "my.weights.safetensors"], None, 1),
        (["vae.fp16.safetensors", "vae.safetensors"], "fp16", 0),
    ],
)
def test_the_plain_weights_are_taken_unless_a_variant_is_asked_for(tmp_path, names, variant, taken):
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    assert seed(tmp_path, variant) == taken


def test_variants_that_nothing_tells_apart_are_named_and_so_are_those_there_are(tmp_path):
    write(tmp_path / "model.fp16.safetensors", 0)
    assert seed(tmp_path) == 0
    write(tmp_path / "model.bf16.safetensors", 1)
    with pytest.raises(ValueError, match=r"model\.bf16\.safetensors, model\.fp16\.safetensors: name .* the variant"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights of the variant 'fp8' in .* has those of bf16, fp16"):
        open_checkpoint(tmp_path, variant="fp8")
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "model.safetensors", 1)
    with pytest.raises(FileNotFoundError, match="has no variants"):
        open_checkpoint(tmp_path, "plain", variant="fp16")


def test_a_part_of_a_file_is_taken_by_the_prefix_of_its_names(tmp_path):
    arrays = {"ema.a.weight": np.zeros(2, np.float32), "model.a.weight": np.ones(2, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "both.safetensors")
    source = open_checkpoint(tmp_path, part="model")
    assert list(source.shapes()) == ["model.a.weight"]
    with pytest.raises(ValueError, match="has no part 'mod': expected one of ema, model"):
        open_checkpoint(tmp_path, part="mod")
