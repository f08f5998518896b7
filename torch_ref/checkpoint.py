"""Checkpoint directories in the public layout: config.json beside weights in safetensors."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS_NAME = "diffusion_pytorch_model"


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of config.json; raises FileNotFoundError where there is none."""
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of `*.safetensors`, or where there are none of `*.bin`, read with weights_only=True.

    Raises FileNotFoundError where there are no weights, ValueError where there is more than one set of them.
    """
    from safetensors.torch import load_file

    def load_bin(path: Path) -> dict[str, Tensor]:
        return torch.load(path, map_location="cpu", weights_only=True)

    for suffix, load in ((".safetensors", load_file), (".bin", load_bin)):
        files = weight_files(directory, suffix)
        if files:
            return {key: tensor for path in files for key, tensor in load(path).items()}
    raise FileNotFoundError(f"no weights in {directory}: expected *.safetensors or *.bin")


def weight_files(directory: Path, suffix: str) -> list[Path]:
    """The one file of weights, or the files an index names; none where there are neither."""
    indices = sorted(directory.glob(f"*{suffix}.index.json"))
    files = indices or sorted(directory.glob(f"*{suffix}"))
    if len(files) > 1:
        names = [path.name for path in files]
        raise ValueError(f"{directory} holds more than one set of weights, {names}: leave only the one to read")
    if not indices:
        return files
    names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{indices[0]} names {outside}: expected files of its own directory")
    return [directory / name for name in names]


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_size: int | None = None
) -> None:
    """Writes config.json and the weights: one file, or several of at most `max_shard_size` bytes and an index.

    Raises ValueError where the directory holds weights under names that would stay beside the new ones.
    """
    shards = split(tensors, max_shard_size)
    names = [f"{WEIGHTS_NAME}.safetensors"]
    if len(shards) > 1:
        names = [f"{WEIGHTS_NAME}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]

    writers: dict[str, Callable[[Path], object]] = {}
    for name, shard in zip(names, shards, strict=True):
        writers[name] = lambda path, shard=shard: write_weights(shard, path)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        writers[f"{WEIGHTS_NAME}.safetensors.index.json"] = lambda path: write_json(index, path)
    writers["config.json"] = lambda path: write_json(config, path)

    stale = {path.name for suffix in ("safetensors", "bin") for path in directory.glob(f"*.{suffix}*")} - writers.keys()
    if stale:
        raise ValueError(f"{directory} already holds other weights, {sorted(stale)}: remove them or save elsewhere")
    write_all(directory, writers)


def split(tensors: Mapping[str, Tensor], max_shard_size: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, in shards of at most that many bytes; a larger tensor gets a shard of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if max_shard_size is not None and shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    return shards


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # save_file makes files that only their owner can read


def write_json(values: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_all(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Lets every writer finish under a temporary name before any file gets its own, and leaves no temporary file."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
