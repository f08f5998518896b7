"""Checkpoints: config.json beside weights with torch's names and axis order, in one file or shards, here or on the hub.

Opening one reads only headers.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flax_vae.io.files import PICKLED, SAFE, read_json, replacing
from flax_vae.io.foreign.hub import CONFIG_FILE, download
from flax_vae.io.foreign.torch_file import TorchFile
from flax_vae.io.weights import DTYPES, SafetensorsFile, Spec, Tensors, write_safetensors
from flax_vae.io.weights_files import INDEX, parse, read_index, weights_in

T = TypeVar("T")
DEFAULT = Path(__file__).parents[1] / "default_weights"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def open_checkpoint(
    path_or_hub_name: str | os.PathLike,
    subfolder: str | None = None,
    variant: str | None = None,
    part: str | None = None,
) -> "Checkpoint":
    """Opens a checkpoint directory, a weights file, or what a name on the hub asks for, which is downloaded.

    Weights are .safetensors, also in shards with an index, or .bin, .pt, .pth, .ckpt, as torch.save wrote them: a
    state_dict, or whatever a trainer keeps it in. A name on the hub is owner/name[/folder], hf://owner/name[/folder],
    or the address of a page of the hub. "default" is the small model in this package, unless there is a file or folder
    of that name.

    Args:
      path_or_hub_name: of the checkpoint.
      subfolder: the folder in there that is meant.
      variant: the copy of the weights that is meant, as "fp16", by default the one that is called no variant.
      part: the part of the file that is meant, by the prefix of its names, as "ema".

    Raises:
      FileNotFoundError: there is no such checkpoint. ValueError: files that are damaged, hostile, ambiguous, or not
      what their name says.
    """
    path, name = Path(path_or_hub_name), os.fspath(path_or_hub_name)
    if path.exists():
        if subfolder is not None and not (path / subfolder).is_dir():
            raise FileNotFoundError(f"{path} has no folder {subfolder}")
        return Checkpoint(path / (subfolder or ""), variant, part)
    if path == Path("default") and subfolder is None:
        return Checkpoint(DEFAULT, variant, part)
    return Checkpoint(download(name, subfolder, variant), variant, part)


class Checkpoint:
    """The config and the tensors of a directory, or of a weights file and the config beside it."""

    def __init__(self, path: Path, variant: str | None = None, part: str | None = None):
        weights = weights_in(path, variant) if path.is_dir() else path
        self.directory, self.origin, files = weights.parent, str(weights), open_weights(weights)
        prefix = "" if part is None else f"{part}."
        self._files = {key: file for key, file in files.items() if key.startswith(prefix)}
        if not self._files and files:
            parts = sorted({key.partition(".")[0] for key in files})
            raise ValueError(f"{weights} has no part {part!r}: expected one of {', '.join(parts[:9])}")

    def has_config(self) -> bool:
        """Whether there is a config.json beside the weights."""
        return (self.directory / CONFIG_FILE).exists()

    def config(self, parse: Callable[[dict[str, Any]], T] = dict[str, Any]) -> T:
        """Returns config.json as `parse` does; FileNotFoundError where there is none, ValueError names the file."""
        if not self.has_config():
            raise FileNotFoundError(f"no {CONFIG_FILE} beside the weights in {self.directory}: add it or pass a config")
        return read_json(self.directory / CONFIG_FILE, parse)

    def shapes(self) -> dict[str, Spec]:
        """Returns every tensor's shape, in torch's axis order, and the name of its dtype."""
        return {key: file.specs[key] for key, file in self._files.items()}

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor, in torch's axis order."""
        return self._files[key].read(key)


def open_weights(path: Path) -> dict[str, SafetensorsFile | TorchFile]:
    """Opens a weights file, or those that an index names; returns, by tensor, the file that holds it."""
    weight_map = read_index(path) if (name := parse(path.name)) and name.is_index else None
    if name is None or not path.is_file():
        suffixes = f"*{', *'.join(SAFE + PICKLED)}"
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
