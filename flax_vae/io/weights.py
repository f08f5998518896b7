"""Weights files: tensors by name, read and written one at a time.

No file can run code: of .bin, .pt and .pth files only plain tensors are accepted.
"""

import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # also teaches numpy, and through it safetensors, what bfloat16 is
import numpy as np
from safetensors import SafetensorError, safe_open

from flax_vae.io.files import kind

Spec = tuple[tuple[int, ...], str]  # a tensor's shape and the name of its dtype
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # and what safetensors calls them
FORMAT = {"format": "pt"}  # what other libraries look for in the metadata of weights
CONTAINERS = ("model", "state_dict")  # where training checkpoints keep the weights
MAPPED_LIMIT = 2**26  # bytes read of a torch file before it is reopened


class Tensors(Protocol):
    """Tensors by name, read one at a time."""

    def shapes(self) -> Mapping[str, Spec]:
        """Returns every tensor's shape and the name of its dtype, without reading any."""
        ...

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor."""
        ...


class Arrays:
    """Tensors in memory by name; each is transposed to torch's axis order, `axes`, when it is read."""

    def __init__(self, arrays: Mapping[str, Any], axes: Mapping[str, tuple[int, ...]] | None = None):
        self._arrays = arrays
        self._axes = {key: tuple(range(array.ndim)) for key, array in arrays.items()} if axes is None else axes

    def shapes(self) -> dict[str, Spec]:
        """Returns every tensor's shape, in torch's axis order, and the name of its dtype."""
        arrays, axes = self._arrays, self._axes
        return {key: (tuple(arrays[key].shape[axis] for axis in axes[key]), arrays[key].dtype.name) for key in arrays}

    def read(self, key: str) -> np.ndarray:
        """Returns one tensor, in torch's axis order."""
        return np.asarray(self._arrays[key]).transpose(self._axes[key])


class SafetensorsFile:
    """The tensors of one .safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        names = {code: name for name, code in DTYPES.items()}
        with self._open() as file:
            headers = {key: file.get_slice(key) for key in list(file.keys())}
            codes = {key: str(header.get_dtype()) for key, header in headers.items()}
            self.specs = {key: (tuple(headers[key].get_shape()), names.get(code, code)) for key, code in codes.items()}
            self.metadata: dict[str, str] = file.metadata() or {}

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor."""
        with self._open() as file:  # reopened for every tensor: pages read of a mapped file stay in memory
            return file.get_tensor(key)

    def _open(self):
        try:
            return safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            what = f"{self.path} is not valid safetensors ({error}); it looks like {kind(self.path)}"
            raise ValueError(what) from None


class TorchFile:
    """The tensors of one .bin, .pt or .pth file; one from before torch 1.6 is held in memory whole."""

    def __init__(self, path: Path):
        self.path, self._is_mapped = path, zipfile.is_zipfile(path)
        self._open()
        self.specs = {key: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for key, x in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor."""
        import torch

        tensor = self._tensors[key].detach()
        self._bytes_read += tensor.nbytes
        if self._is_mapped and self._bytes_read > MAPPED_LIMIT:  # pages read of a mapped file stay in memory
            self._open()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def _open(self) -> None:
        self._tensors, self._bytes_read = load_pickled(self.path, self._is_mapped), 0


def load_pickled(path: Path, is_mapped: bool) -> dict[str, Any]:
    """Opens a torch file; returns its tensors by name, those of a training checkpoint out of their containers."""
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
    for _ in CONTAINERS:  # one may be inside the other
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), dict)]
        if len(inner) > 1:
            raise ValueError(f"{path} holds both {' and '.join(CONTAINERS)}: save the one that is meant alone")
        content = inner[0] if inner else content

    def is_plain(key, x):
        is_tensor = isinstance(key, str) and isinstance(x, torch.Tensor)
        return is_tensor and x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized

    if others := [key for key, x in content.items() if not is_plain(key, x)]:
        raise ValueError(f"{path} must hold plain tensors by name, got also {others}: save the state_dict alone")
    return content


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] = FORMAT) -> None:
    """Writes tensors as safetensors, one at a time; the library would need all of them in memory at once."""
    shapes, end = tensors.shapes(), 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # widest first, so that all are aligned
    keys = sorted(shapes, key=lambda key: (-np.dtype(shapes[key][1]).itemsize, key))
    for key in keys:
        shape, dtype = shapes[key]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            file.write(tensors.read(key).ravel().view(np.uint8).data)
