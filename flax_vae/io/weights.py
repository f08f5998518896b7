"""Weights files: tensors by name, read and written one at a time.

Those that torch.save wrote are read in foreign/torch_file.py.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 (teaches numpy, and through it safetensors, what bfloat16 is)
import numpy as np
from safetensors import SafetensorError, safe_open

from flax_vae.io.files import kind

Spec = tuple[tuple[int, ...], str]  # a tensor's shape and the name of its dtype
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # and what safetensors calls them
FORMAT = {"format": "pt"}  # what other libraries look for in the metadata of weights


class Tensors(Protocol):
    """Tensors by name, read one at a time; errors name their `origin`."""

    origin: str

    def shapes(self) -> Mapping[str, Spec]:
        """Returns every tensor's shape and the name of its dtype, without reading any."""
        ...

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor."""
        ...


class Arrays:
    """Tensors in memory by name; each is transposed to torch's axis order, `axes`, when it is read."""

    def __init__(
        self,
        arrays: Mapping[str, Any],
        axes: Mapping[str, tuple[int, ...]] | None = None,
        origin: str | os.PathLike = "the tensors given",
    ):
        self._arrays, self.origin = arrays, os.fspath(origin)
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
