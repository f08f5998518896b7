"""Checkpoints: config.json beside weights with torch's names and axis order, in one file or shards, here or on the hub.

Opening one reads only headers.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_vae.io.files import PICKLED, SAFE, read_json, replacing
from flax_vae.io.weights import DTYPES, SafetensorsFile, Spec, Tensors, TorchFile, write_safetensors

INDEX = ".index.json"
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # taken before others where there are several
DEFAULT = Path(__file__).parents[1] / "default_weights"
WEIGHTS_FILE, CONFIG_FILE = "diffusion_pytorch_model.safetensors", "config.json"
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)/?", re.ASCII)


def open_checkpoint(path_or_hub_name: str | os.PathLike, subfolder: str | None = None) -> "Checkpoint":
    """Opens a checkpoint directory, a weights file, or a hub name "owner/name[/folder]", which is downloaded.

    Weights are .safetensors, also in shards with an index, or .bin, .pt, .pth; there the tensors may be in a `model` or
    `state_dict`, and what is beside it is left out. "default" is the small model in this package, unless there is a
    file or folder of that name. With `subfolder` the checkpoint is the one in that folder.

    Raises FileNotFoundError where there is no such checkpoint, ImportError where torch is needed, and ValueError for
    files that are damaged, hostile, ambiguous, or not what their name says.
    """
    path, name = Path(path_or_hub_name), os.fspath(path_or_hub_name)
    if path.exists():
        if subfolder is not None and not (path / subfolder).is_dir():
            raise FileNotFoundError(f"{path} has no folder {subfolder}")
        return Checkpoint(path / (subfolder or ""))
    if path == Path("default") and subfolder is None:
        return Checkpoint(DEFAULT)
    return Checkpoint(download(name if subfolder is None else f"{name}/{subfolder}"))


class Checkpoint:
    """The config and the tensors of a directory, or of a weights file and the config beside it."""

    def __init__(self, path: Path):
        weights = weights_in(path) if path.is_dir() else path
        self.directory, self._files = weights.parent, open_weights(weights)

    def has_config(self) -> bool:
        """Whether there is a config.json beside the weights."""
        return (self.directory / CONFIG_FILE).exists()

    def config(self) -> dict[str, Any]:
        """Returns the contents of config.json; FileNotFoundError where there is none."""
        if not self.has_config():
            raise FileNotFoundError(f"no {CONFIG_FILE} beside the weights in {self.directory}: add it or pass a config")
        return read_json(self.directory / CONFIG_FILE)

    def shapes(self) -> dict[str, Spec]:
        """Returns every tensor's shape, in torch's axis order, and the name of its dtype."""
        return {key: file.specs[key] for key, file in self._files.items()}

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor, in torch's axis order."""
        return self._files[key].read(key)


def open_weights(path: Path) -> dict[str, SafetensorsFile | TorchFile]:
    """Opens a weights file, or those that an index names; returns, by tensor, the file that holds it."""
    weight_map = read_index(path) if path.name.endswith(INDEX) else None
    suffixes = f"*{', *'.join(SAFE + PICKLED)}"
    if weight_map is None and not (path.name.endswith(SAFE + PICKLED) and path.is_file()):
        raise ValueError(f"{path} is no weights file: expected one named {suffixes}, an index *{INDEX}, or a directory")
    names = sorted({path.name} if weight_map is None else set(weight_map.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"{path} names files that are not beside it, fetch them too: {', '.join(missing)}")
    files = {name: (SafetensorsFile if name.endswith(SAFE) else TorchFile)(path.parent / name) for name in names}
    held = [(key, name) for name, file in files.items() for key in file.specs]
    stray = set(held) ^ set(weight_map.items() if weight_map is not None else held)
    if stray:
        listed = "\n  ".join(f"{key} in {name}" for key, name in sorted(stray))
        raise ValueError(f"{path} and the files it names do not agree, fetch them again:\n  {listed}")
    return {key: files[name] for key, name in held}


def read_index(path: Path) -> dict[str, str]:
    """Reads an index, the file name of every tensor; ValueError unless all are files of its own directory."""
    weight_map: Any = read_json(path).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    plain = re.compile(rf"[^./\\:\0][^/\\:\0]*({'|'.join(map(re.escape, SAFE + PICKLED))})")
    wrong = [name for name in names if not isinstance(name, str) or not plain.fullmatch(name)]
    if wrong:
        raise ValueError(f"{path}: 'weight_map' must name weights files in the same directory, got {wrong[:9]}")
    return weight_map


def weights_in(directory: Path) -> Path:
    """Picks the weights file or index of a directory: safetensors before pickles, usual names before others.

    Raises FileNotFoundError where there is none, ValueError that lists them where several are left.
    """
    for suffixes in (SAFE, PICKLED):
        found = sorted(p for p in directory.iterdir() if p.name.removesuffix(INDEX).endswith(suffixes) and p.is_file())
        shards = {name for path in found if path.name.endswith(INDEX) for name in read_index(path).values()}
        found = [path for path in found if path.name not in shards and not path.name.startswith(".")]
        usual = ([p for p in found if p.name.removesuffix(INDEX).rpartition(".")[0] == name] for name in NAMES)
        found = next(filter(None, usual), found)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{directory} holds several weights, {names}: name the one that is meant")
        if found:
            return found[0]
    raise FileNotFoundError(f"no weights in {directory}: expected *{', *'.join(SAFE + PICKLED)}")


def download(name: str) -> Path:
    """Downloads the config and the weights of "owner/name[/folder]" from the hub; returns their directory."""
    missing = f"{name} is no file or directory here"
    match = HUB_NAME.fullmatch(name)
    if match is None or name.endswith(SAFE + PICKLED):
        raise FileNotFoundError(f"{missing}, and no name on the hub, which would be owner/name or owner/name/folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{missing}; to look for it on the hub: pip install huggingface_hub") from None
    repository, folder = match[1], match[2].removeprefix("/")
    within = f"{folder}/" if folder else ""
    for suffixes in (SAFE, PICKLED):
        wanted = [within + CONFIG_FILE, *(f"{within}*{suffix}{end}" for suffix in suffixes for end in ("", INDEX))]
        try:
            root = snapshot_download(repository, allow_patterns=wanted, ignore_patterns=f"{within}*/*")
        except Exception as error:  # no network, no access, no such name: each library below raises errors of its own
            reason = f"{type(error).__name__}: {error}"
            raise FileNotFoundError(f"{missing}, and the hub does not give it: {reason}") from error
        with contextlib.suppress(FileNotFoundError):
            weights_in(Path(root, folder))
            return Path(root, folder)
    raise FileNotFoundError(f"{missing}, and {repository} on the hub has no weights in its {folder or 'top'} folder")


def save(path: str | os.PathLike, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Writes a checkpoint directory, and the parents it needs; replaces a checkpoint saved there before.

    Both files are complete before they get their names, weights first, config last. Raises NotADirectoryError where
    `path` is a file, ValueError where it holds other safetensors, and for a dtype that is not floating point.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: expected a directory to save the checkpoint in")
    others = sorted(p.name for p in directory.glob(f"[!.]*{SAFE[0]}*") if p.name != WEIGHTS_FILE)
    if others:
        raise ValueError(f"{directory} already holds other weights: remove {', '.join(others)}, or save elsewhere")
    wrong = [f"{key} in {dtype}" for key, (_, dtype) in tensors.shapes().items() if dtype not in DTYPES]
    if wrong:
        raise ValueError(f"only {', '.join(DTYPES)} can be saved, got {', '.join(wrong)}")
    text = json.dumps(config, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / CONFIG_FILE) as config_part:
        config_part.write_bytes(text.encode())
        with replacing(directory / WEIGHTS_FILE) as weights_part:
            write_safetensors(weights_part, tensors)
