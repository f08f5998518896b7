"""Checkpoints on disk: config.json beside weights with torch's names and axis order, read and written tensor by tensor.

Opening one reads headers alone. No file can run code: .bin, .pt and .pth files may hold nothing but plain tensors.
"""

import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes  # also teaches numpy, and through it safetensors, what bfloat16 is
import numpy as np
from safetensors import SafetensorError, safe_open

Spec = tuple[tuple[int, ...], str]  # a tensor's shape and the name of its dtype
SAFE, PICKLED, INDEX = (".safetensors",), (".bin", ".pt", ".pth"), ".index.json"
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # which weights to take where there are several
WEIGHTS_FILE, CONFIG_FILE = "diffusion_pytorch_model.safetensors", "config.json"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # and what safetensors calls them
CONTAINERS = ("model", "state_dict")  # where training checkpoints keep the weights
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)/?", re.ASCII)
JSON_LIMIT = 2**26  # bytes of a config or an index
MAPPED_LIMIT = 2**26  # bytes read of a torch file before it is opened anew


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    def shapes(self) -> Mapping[str, Spec]:
        """Gives every tensor's shape and the name of its dtype, without reading any."""
        ...

    def read(self, key: str) -> np.ndarray:
        """Gives one tensor."""
        ...


@contextmanager
def open_checkpoint(path_or_hub_name: str | os.PathLike) -> Iterator["Checkpoint"]:
    """Opens a checkpoint directory, a weights file, or a hub name "owner/name[/folder]", which is downloaded.

    Weights are .safetensors, also in shards with an index, or .bin, .pt, .pth; there the tensors may be in a
    `model` or `state_dict` among other things, which are left out. Raises FileNotFoundError where there is no such
    checkpoint, ImportError where torch is needed, and ValueError for files that are damaged, hostile, ambiguous, or
    not what their name says.
    """
    path = Path(path_or_hub_name)
    yield Checkpoint(path if path.exists() else download(os.fspath(path_or_hub_name)))


class Checkpoint:
    """The config and the tensors of a directory, or of a weights file and the config beside it."""

    def __init__(self, path: Path):
        weights = weights_in(path) if path.is_dir() else path
        self.directory, self._files = weights.parent, open_weights(weights)

    def config(self) -> dict[str, Any]:
        """Gives what config.json says; FileNotFoundError where there is none."""
        path = self.directory / CONFIG_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"no {CONFIG_FILE} beside the weights in {self.directory}: add it, or pass a config"
            )
        return read_json(path)

    def shapes(self) -> dict[str, Spec]:
        """Gives every tensor's shape, in torch's axis order, and the name of its dtype."""
        return {key: file.specs[key] for key, file in self._files.items()}

    def read(self, key: str) -> np.ndarray:
        """Gives one tensor, in torch's axis order."""
        return self._files[key].read(key)


class SafetensorsFile:
    """The tensors of one .safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        names = {code: name for name, code in DTYPES.items()}
        with self._open() as file:
            headers = {key: file.get_slice(key) for key in list(file.keys())}
            codes = {key: str(header.get_dtype()) for key, header in headers.items()}
            self.specs = {key: (tuple(headers[key].get_shape()), names.get(code, code)) for key, code in codes.items()}

    def read(self, key: str) -> np.ndarray:
        with self._open() as file:  # anew for every tensor: what was read of an open file stays in memory
            return file.get_tensor(key)

    def _open(self):
        try:
            return safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is not valid safetensors ({error}); it looks like {kind(self.path)}"
            ) from None


class TorchFile:
    """The tensors of one .bin, .pt or .pth file; a file from before torch 1.6 is held in memory whole."""

    def __init__(self, path: Path):
        self.path, self._is_mapped = path, zipfile.is_zipfile(path)
        self._open()
        self.specs = {key: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for key, x in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        import torch

        tensor = self._tensors[key].detach()
        self._bytes_read += tensor.nbytes
        if self._is_mapped and self._bytes_read > MAPPED_LIMIT:  # what was read of an open file stays in memory
            self._open()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def _open(self) -> None:
        self._tensors, self._bytes_read = load_pickled(self.path, self._is_mapped), 0


def load_pickled(path: Path, is_mapped: bool) -> dict[str, Any]:
    """Gives the tensors of a torch file by name, out of the containers of a training checkpoint."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: pip install torch, or convert it to safetensors") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise ImportError(f"torch {torch.__version__} could be made to run code by {path}: pip install 'torch>=2.6'")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # a damaged pickle can raise anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds a {found[1]}: save the state_dict alone" if found else f"it looks like {kind(path)}"
        raise ValueError(f"{path} is not plain torch tensors ({type(error).__name__}); {what}") from None
    content = content if isinstance(content, dict) else {type(content).__name__: content}
    for _ in CONTAINERS:  # one may hold the other
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), dict)]
        if len(inner) > 1:
            raise ValueError(f"{path} holds both {' and '.join(CONTAINERS)}: save the one that is meant alone")
        content = inner[0] if inner else content

    def is_plain(key, x):
        is_tensor = isinstance(key, str) and isinstance(x, torch.Tensor)
        return is_tensor and x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized

    others = [key for key, x in content.items() if not is_plain(key, x)]
    if others:
        raise ValueError(f"{path} must hold plain tensors by name, got also {others}: save the state_dict alone")
    return content


def open_weights(path: Path) -> dict[str, SafetensorsFile | TorchFile]:
    """Opens the weights file, or the files that an index names, and gives the one that holds each tensor."""
    weight_map = read_index(path) if path.name.endswith(INDEX) else None
    names = sorted({path.name} if weight_map is None else set(weight_map.values()))
    unfit = [name for name in names if not name.endswith(SAFE + PICKLED) or not (path.parent / name).is_file()]
    if unfit:
        raise ValueError(f"{path}: {', '.join(unfit)} must be files beside it, named *{', *'.join(SAFE + PICKLED)}")
    files = {name: (SafetensorsFile if name.endswith(SAFE) else TorchFile)(path.parent / name) for name in names}
    held = [(key, name) for name, file in files.items() for key in file.specs]
    astray = set(held) ^ set(weight_map.items() if weight_map is not None else held)
    if astray:
        listed = "\n  ".join(f"{key} in {name}" for key, name in sorted(astray))
        raise ValueError(f"{path} and the files it names do not agree, fetch them again:\n  {listed}")
    return {key: files[name] for key, name in held}


def read_index(path: Path) -> dict[str, str]:
    """Gives the file name of every tensor; ValueError unless an index names files of its own directory."""
    weight_map: Any = read_json(path).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    plain = re.compile(rf"[^./\\:\0][^/\\:\0]*({'|'.join(map(re.escape, SAFE + PICKLED))})")
    strange = [name for name in names if not isinstance(name, str) or not plain.fullmatch(name)]
    if strange:
        raise ValueError(f"{path}: 'weight_map' must name weights files in the same directory, got {strange[:9]}")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError names the file and what it is instead."""
    size = path.stat().st_size
    if size > JSON_LIMIT:
        raise ValueError(f"{path} has {size:,} bytes: expected a config or an index of at most {JSON_LIMIT:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); it looks like {kind(path)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def weights_in(directory: Path) -> Path:
    """Picks a directory's weights file or index: safetensors before others, usual names before others.

    Raises FileNotFoundError where there is none, ValueError listing them where several are left.
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
    """Fetches the config and the weights of "owner/name[/folder]" from the hub and gives their directory."""
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
        except Exception as error:  # its libraries raise their own kinds for no network, no access, no such name
            reason = f"{type(error).__name__}: {error}"
            raise FileNotFoundError(f"{missing}, and the hub does not give it: {reason}") from error
        try:
            weights_in(Path(root, folder))
        except FileNotFoundError:
            continue
        return Path(root, folder)
    raise FileNotFoundError(f"{missing}, and {repository} on the hub has no weights in its {folder or 'top'} folder")


def save(path: str | os.PathLike, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Writes a checkpoint directory, and the parents it needs; a checkpoint saved there before is replaced.

    Both files are complete before they get their names, weights first, config last. Raises NotADirectoryError when
    `path` is a file, ValueError when it holds other safetensors or when a dtype is not floating point.
    """
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: expected a directory to save the checkpoint in")
    others = sorted(p.name for p in directory.glob(f"[!.]*{SAFE[0]}*") if p.name != WEIGHTS_FILE)
    if others:
        raise ValueError(f"{directory} already holds other weights: remove {', '.join(others)}, or save elsewhere")
    strange = [f"{key} in {dtype}" for key, (_, dtype) in tensors.shapes().items() if dtype not in DTYPES]
    if strange:
        raise ValueError(f"only {', '.join(DTYPES)} can be saved, got {', '.join(strange)}")
    text = json.dumps(config, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / CONFIG_FILE) as config_file:
        config_file.write(text.encode())
        config_file.flush()
        with replacing(directory / WEIGHTS_FILE) as weights_file:
            write_safetensors(weights_file, tensors)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write, which takes the name `path` when all goes well and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(file: BinaryIO, tensors: Tensors) -> None:
    """Writes tensors as safetensors, one by one; the library would need all of them in memory at once."""
    shapes, end = tensors.shapes(), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    keys = sorted(shapes, key=lambda key: (-np.dtype(shapes[key][1]).itemsize, key))  # wide ones first: all are aligned
    for key in keys:
        shape, dtype = shapes[key]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for key in keys:
        file.write(tensors.read(key).ravel().view(np.uint8).data)


def kind(path: Path) -> str:
    """Says what a file looks like from its first bytes, and what to do about it."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of the file: run git lfs pull"
    if head.lstrip().startswith(b"<"):
        return "a web page instead of the file: fetch it again"
    if head[8:9] == b"{":
        header, size = int.from_bytes(head[:8], "little"), path.stat().st_size
        claim = f"with a header of {header:,} in {size:,} bytes"
        return f"safetensors, whole or in part, {claim}: fetch it again, or end its name in {SAFE[0]}"
    if head.startswith((b"PK", b"\x80")):
        return f"what torch writes, whole or in part: fetch it again, or end its name in {', '.join(PICKLED)}"
    return "something else: fetch it again"
