"""Names of weights files, of their variants and indexes, and which of them is a folder's checkpoint.

A variant, as fp16, is a second copy of the weights: model.fp16.safetensors, or shards with an index, whose name has
been spelled in three ways.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax_vae.io.files import PICKLED, SAFE, read_json

INDEX = ".index.json"
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # taken before others where there are several
SUFFIX = "|".join(map(re.escape, SAFE + PICKLED))
NAME = re.compile(rf"(?P<stem>.+?)(?P<suffix>{SUFFIX})(?P<index>(?:\.[\w-]+)?\.index(?:\.[\w-]+)?\.json)?")


class WeightsName(NamedTuple):
    """What the name of a weights file or of an index tells."""

    stem: str
    variant: str | None
    suffix: str
    is_index: bool

    @property
    def is_plain(self) -> bool:
        """Whether it is no variant, as far as the name shows: my.weights.safetensors may just be called so."""
        return self.variant is None or self.stem not in NAMES


def parse(name: str) -> WeightsName | None:
    """Returns what the name of a weights file or an index tells; None for another file's."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    stem, dot, variant = re.sub(r"-\d+-of-\d+", "", found["stem"]).rpartition(".")
    late = re.sub(r"\.(?:index|json)", "", found["index"] or "").strip(".")
    plain = stem if dot else variant
    return WeightsName(plain, late or (variant if dot else None), found["suffix"], found["index"] is not None)


def is_weights(name: str) -> bool:
    """Whether a file is called as weights or an index are."""
    return parse(name) is not None


def read_index(path: Path) -> dict[str, str]:
    """Reads an index, the file name of every tensor; ValueError unless all are files of its own directory."""
    weight_map: Any = read_json(path).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    plain = re.compile(rf"[^./\\:\0][^/\\:\0]*({SUFFIX})")
    wrong = [name for name in names if not isinstance(name, str) or not plain.fullmatch(name)]
    if wrong:
        raise ValueError(f"{path}: 'weight_map' must name weights files in the same directory, got {wrong[:9]}")
    return weight_map


def weights_in(directory: Path, variant: str | None = None) -> Path:
    """Picks the weights file or index of a directory: that of a variant, or those that are none before those that are.

    Then safetensors come before pickles, and usual names before others. Raises FileNotFoundError where there is none,
    ValueError that lists them where several are left.
    """
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")]
    found = {path: name for path in files if (name := parse(path.name))}
    shards = {name for path, told in found.items() if told.is_index for name in read_index(path).values()}
    found = {path: name for path, name in found.items() if path.name not in shards}
    variants = sorted({name.variant for name in found.values() if name.variant})
    if variant is not None:
        found = {path: name for path, name in found.items() if name.variant == variant}
    if not found and variant is not None:
        has = f"has those of {', '.join(variants)}" if variants else "has no variants"
        raise FileNotFoundError(f"no weights of the variant {variant!r} in {directory}, which {has}")
    if not found:
        raise FileNotFoundError(f"no weights in {directory}: expected *{', *'.join(SAFE + PICKLED)}")
    tests: list[Callable[[WeightsName], bool]] = [
        lambda name: name.is_plain,
        lambda name: name.suffix in SAFE,
        *(lambda name, usual=usual: name.stem == usual for usual in NAMES),
    ]
    for test in tests:  # from the most important on: what passes is kept, unless nothing does
        found = {path: name for path, name in found.items() if test(name)} or found
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{directory} holds several weights, {names}: name the file that is meant, or the variant")
    return next(iter(found))
