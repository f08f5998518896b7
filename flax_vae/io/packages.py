"""Weights that come in Python packages, as pickles of numpy arrays; neither packages nor pickles run anything."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util


def packaged_file(name: str, advice: str) -> Path:
    """Returns the path of a file in a package, as package/weights/file, without importing the package.

    Raises FileNotFoundError, with the text `advice`, where it is not installed.
    """
    spec = importlib.util.find_spec(Path(name).parts[0])
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder).parent / name).is_file():
            return path
    raise FileNotFoundError(advice)


def read_arrays(path: Path, package: str) -> dict[tuple[str, ...], np.ndarray]:
    """Reads a pickle of nested dictionaries of arrays; returns each array by its path of keys.

    Raises ValueError, which names the `package` that such files come from, for anything else.
    """
    with open(path, "rb") as file:
        try:
            arrays = traverse_util.flatten_dict(ArraysOnly(file).load())
            return {keys: np.asarray(value) for keys, value in arrays.items()}
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: not the weights of {package}, or damaged ({error})") from None


ARRAYS = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and calls nothing else that a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what arrays are built with; UnpicklingError for any other name."""
        if (module.rpartition(".")[2], name) not in ARRAYS or module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
