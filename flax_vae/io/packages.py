"""Weights that come in Python packages, as pickles of numpy arrays; neither packages nor pickles run anything."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def packaged_file(name: str, advice: str) -> Path:
    """Gives the path of a file in a package, as package/weights/file, without importing it.

    Raises FileNotFoundError, which says `advice`, where it is not installed.
    """
    spec = importlib.util.find_spec(Path(name).parts[0])
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder).parent / name).is_file():
            return path
    raise FileNotFoundError(advice)


def read_arrays(path: Path, package: str) -> dict[tuple[str, ...], np.ndarray]:
    """Reads a pickle of nested dictionaries of arrays, and gives each by the keys that lead to it.

    Raises ValueError, which names the `package` that such files come from, for anything else.
    """
    with open(path, "rb") as file:
        try:
            return dict(leaves(ArraysOnly(file).load()))
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: not the weights of {package}, or damaged ({error})") from None


def leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the arrays of nested dictionaries, with the keys that lead to them."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*above, key))
    else:
        yield above, np.asarray(tree)


ARRAYS = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ArraysOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays in plain containers, and runs nothing else that they ask for."""

    def find_class(self, module: str, name: str) -> Any:
        """Gives what an array is made with; UnpicklingError for any other name."""
        if (module.rpartition(".")[2], name) not in ARRAYS or module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
