"""Nested tuples of arrays, such as the carry of a stream, as a safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_vae.io.files import PathLike, replacing
from flax_vae.io.weights import DTYPES, Arrays, SafetensorsFile, write_safetensors

TREE = "tree"  # key of the metadata that holds the nesting of the tuples, as JSON


def save_tree(path: PathLike, tree: Any, about: Mapping[str, str] | None = None) -> None:
    """Writes nested tuples of floating-point arrays, or None; the file takes its name when it is complete.

    The header also holds the texts `about`. Raises ValueError for anything else in the tree, and a text named "tree".
    """
    if TREE in (about or {}):
        raise ValueError(f"{path}: a text cannot be named {TREE!r}, where the nesting of the tree is kept")
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: not isinstance(node, tuple | None))
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray) or leaf.dtype.name not in DTYPES:
            raise ValueError(f"a {type(leaf).__name__} cannot be saved: expected tuples of floating-point arrays")
    arrays = {str(i): leaf for i, leaf in enumerate(leaves)}
    nesting = json.dumps(jax.tree.unflatten(structure, arrays))  # names in the places of arrays
    with replacing(path) as part:
        write_safetensors(part, Arrays(arrays), {**(about or {}), TREE: nesting})


def load_tree(path: PathLike) -> tuple[Any, dict[str, str]]:
    """Reads what `save_tree` wrote, to the same bits: the tree, of numpy arrays, and the texts about it.

    Raises FileNotFoundError, or ValueError for a file that is damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    file = SafetensorsFile(path)

    def built(node: Any) -> Any:
        if isinstance(node, list):
            return tuple(built(entry) for entry in node)
        if node is not None and node not in file.specs:
            raise ValueError(f"no array {node!r}")
        return None if node is None else file.read(node)

    try:
        about = dict(file.metadata)
        return built(json.loads(about.pop(TREE))), about
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: holds no tuples of arrays that flax_vae has written ({error})") from None
