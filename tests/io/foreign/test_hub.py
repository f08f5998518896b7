"""Names and addresses of the hub: what each asks for, what is fetched, and what an error says, without a network."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flax_vae.families import registry
from flax_vae.io import port
from flax_vae.io.checkpoint import open_checkpoint, save
from flax_vae.io.foreign.hub import HubName, download, hub_name
from tests.little import CONFIG as LITTLE

CONFIG = {"_class_name": "Anything"}


def tensors(seed=0) -> dict[str, np.ndarray]:
    return {"a.weight": np.full((2, 3), seed, np.float32)}


def write(path: Path, arrays: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, path)
    (path.parent / "config.json").write_text(json.dumps(CONFIG))
    return path


def read(path, **asked) -> dict[str, np.ndarray]:
    source = open_checkpoint(path, **asked)
    return {key: source.read(key) for key in source.shapes()}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, `tmp_path`/repo; gives the calls it gets."""
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="hub names need huggingface_hub")
    calls = []

    def snapshot_download(repo_id, allow_patterns, ignore_patterns, revision="main"):
        if repo_id != "owner/na.me-1" or revision not in ("main", "v2"):
            raise ConnectionError("no such place")
        repository, snapshot = tmp_path / "repo", tmp_path / "snapshot"
        files = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        kept = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        calls.append(sorted(kept))
        for name in calls[-1]:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes((repository / name).read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("folder", ["", "vae", "deep/er"])
def test_hub_name_fetches_the_config_and_weights_of_that_folder_alone(tmp_path, hub, folder):
    for seed, place in enumerate(["", "vae", "deep/er", "vae/old", "deep"]):
        write(tmp_path / "repo" / place / "model.safetensors", tensors(seed))
        (tmp_path / "repo" / place / "pytorch_model.bin").write_bytes(b"twice as much to fetch")
        (tmp_path / "repo" / place / "README.md").write_text("not needed")
    assert same(read(f"owner/na.me-1/{folder}"), tensors(["", "vae", "deep/er"].index(folder)))
    assert hub == [[str(Path(folder, name)) for name in ("config.json", "model.safetensors")]]


def test_a_subfolder_on_the_hub_is_part_of_the_name(tmp_path, hub):
    for seed, place in enumerate(["", "vae"]):
        write(tmp_path / "repo" / place / "model.safetensors", tensors(seed))
    source = open_checkpoint("owner/na.me-1", "vae")
    assert same({key: source.read(key) for key in source.shapes()}, tensors(1))
    assert hub == [["vae/config.json", "vae/model.safetensors"]]


def test_hub_name_falls_back_to_pickles(tmp_path, hub):
    write(tmp_path / "repo" / "x.safetensors", tensors()).rename(tmp_path / "repo" / "pytorch_model.bin")
    assert download("owner/na.me-1") == tmp_path / "snapshot"
    assert hub == [["config.json"], ["config.json", "pytorch_model.bin"]]


def test_hub_folder_without_weights_is_not_found(tmp_path, hub):
    write(tmp_path / "repo" / "model.safetensors", tensors())
    with pytest.raises(FileNotFoundError, match=r"no weights in its vae folder"):
        read("owner/na.me-1/vae")


def test_hub_failure_says_both_readings_of_the_name(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        read("runs/last")
    for said in ("runs/last", "no file or directory here", "hub", "ConnectionError: no such place"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["missing", "./a/b", "../a/b", "/a/b", "a/../b", "a/b/../c", "a//b", "~/a", "a/b.safetensors", "a/b/c.pt", ""],
)
def test_path_that_is_no_hub_name_is_not_looked_up(tmp_path, hub, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(name)
    assert hub == []


REPOSITORY = "owner/na.me-1"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", ("owner/name", "", None, None)),
        ("owner/name/vae/", ("owner/name", "vae", None, None)),
        ("hf://owner/name", ("owner/name", "", None, None)),
        ("hf://owner/name/deep/er", ("owner/name", "deep/er", None, None)),
        ("hf://owner/name@v2/vae", ("owner/name", "vae", None, "v2")),
        ("https://huggingface.co/owner/name", ("owner/name", "", None, None)),
        ("http://hf.co/owner/name/", ("owner/name", "", None, None)),
        ("https://huggingface.co/owner/name/tree/main", ("owner/name", "", None, "main")),
        ("https://huggingface.co/owner/name/tree/main/vae", ("owner/name", "vae", None, "main")),
        ("https://huggingface.co/owner/name/blob/v2/vae/config.json", ("owner/name", "vae", None, "v2")),
        (
            "https://huggingface.co/owner/name/resolve/main/vae/x.fp16.safetensors?download=true",
            ("owner/name", "vae", "x.fp16.safetensors", "main"),
        ),
        ("hf://owner/name/last.ckpt", ("owner/name", "", "last.ckpt", None)),
        ("owner/name@v2", None),
        ("owner/name.pt", None),
        ("owner/name/x.safetensors", None),
        ("hf://datasets/owner/name", None),
        ("https://huggingface.co/datasets/owner/name", None),
        ("https://example.com/owner/name", None),
        ("https://huggingface.co/owner/name/tree/main/../x", None),
        ("hf://owner", None),
    ],
)
def test_names_and_addresses_are_understood(text, name):
    assert hub_name(text) == (name and HubName(*name))


@pytest.mark.parametrize("address", ["hf://{}/vae", "https://huggingface.co/{}/tree/main/vae", "hf://{}@v2/vae"])
def test_addresses_fetch_what_the_name_would(tmp_path, hub, address):
    for seed, place in enumerate(["", "vae"]):
        write(tmp_path / "repo" / place / "model.safetensors", tensors(seed))
    assert same(read(address.format(REPOSITORY)), tensors(1))
    assert hub == [["vae/config.json", "vae/model.safetensors"]]


def test_the_address_of_a_file_fetches_that_file_and_its_config(tmp_path, hub):
    for seed, name in enumerate(["model.safetensors", "other.safetensors"]):
        write(tmp_path / "repo" / "vae" / name, tensors(seed))
    address = f"https://huggingface.co/{REPOSITORY}/resolve/main/vae/other.safetensors"
    assert same(read(address), tensors(1))
    assert hub == [["vae/config.json", "vae/other.safetensors"]]
    with pytest.raises(FileNotFoundError, match=r"has no none\.pt in its vae folder"):
        read(f"hf://{REPOSITORY}/vae/none.pt")


def test_a_variant_is_fetched_without_the_others(tmp_path, hub):
    for seed, name in enumerate(["model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"]):
        write(tmp_path / "repo" / name, tensors(seed))
    assert same(read(REPOSITORY, variant="fp16"), tensors(1))
    assert hub == [["config.json", "model.fp16.safetensors"]]
    with pytest.raises(FileNotFoundError, match="has no weights of the variant 'fp8' in its top folder"):
        read(REPOSITORY, variant="fp8")


@pytest.mark.parametrize("name", [REPOSITORY, f"https://huggingface.co/{REPOSITORY}"])
def test_a_folder_of_the_hub_that_has_the_checkpoint_is_named(tmp_path, hub, name):
    arrays = {key: np.zeros(p.torch_shape, np.float32) for key, p in port.parameters(registry.abstract(LITTLE)).items()}
    save(tmp_path / "repo" / "vae", LITTLE.to_dict(), port.Arrays(arrays))
    write(tmp_path / "repo" / "transformer" / "model.safetensors", tensors())
    with pytest.raises(FileNotFoundError, match=rf"{name} has checkpoints in vae: name one as subfolder"):
        registry.open_source(name)
    write(tmp_path / "repo" / "model.safetensors", tensors())
    with pytest.raises(ValueError, match=rf"no family .* {name} has checkpoints in vae: name one as subfolder"):
        registry.open_source(name)
    assert registry.from_pretrained(name, "vae").config == LITTLE


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, hub, monkeypatch):
    import huggingface_hub

    asked = []

    def silent(*args, **settings):
        asked.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    with pytest.raises(FileNotFoundError, match=r"no network$"):
        registry.open_source(REPOSITORY)
    assert len(asked) == 1
