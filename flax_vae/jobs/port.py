"""Ports checkpoints of any readable kind to folders in the layout of diffusers, and proves that nothing changed."""

import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flax_vae.families import registry
from flax_vae.io.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, open_checkpoint
from flax_vae.io.files import scratch
from flax_vae.io.port import match
from flax_vae.io.weights import Tensors
from flax_vae.jobs import CheckFailed
from flax_vae.jobs.model import config_of
from flax_vae.jobs.screen import counted, first_few, note
from flax_vae.jobs.sources import check_apart, check_folder
from flax_vae.models.config import VAEConfig

Row = tuple[str, int, int, int]  # part of the model, tensors, parameters, tensors that are equal


def port(
    src: str,
    dst: Path,
    dtype: str = "keep",
    config: Path | None = None,
    overwrite: bool = False,
    variant: str | None = None,
    part: str | None = None,
) -> tuple[str, list[Row]]:
    """Ports a checkpoint, reads it again and compares it with its source.

    Args:
      src: a checkpoint.
      dst: the folder to write.
      dtype: of the weights; "keep" is that of the source.
      config: stands in for the source's config.json.
      overwrite: whether to replace a checkpoint in `dst`.
      variant, part: of the source, as `open_checkpoint` takes them.

    Returns:
      The dtype of the weights, and a row for each part of the model.

    Raises:
      CheckFailed: a tensor differs from its source; nothing is written.
    """
    check_target(dst, src, overwrite)
    source = registry.open_source(src, variant=variant, part=part)
    settings = config_of(source, config)
    names = match(registry.abstract(settings), source.shapes(), source.origin)
    kind = stored_dtype(source, names.values(), src) if dtype == "keep" else dtype
    note(f"reading {src}")
    with replacing_folder(dst) as folder:
        # no name for the model: it is large, and no longer needed for the comparison
        registry.family_of(settings).load(source, settings, np.dtype(kind)).save_pretrained(folder)
        note("comparing what was written with its source")
        return kind, compare(settings, source, open_checkpoint(folder))


def stored_dtype(source: Checkpoint, tensors: Iterable[str], name: str) -> str:
    """Returns the one dtype of these tensors; ValueError where they have several."""
    shapes = source.shapes()
    kinds = sorted({shapes[tensor][1] for tensor in tensors})
    if len(kinds) > 1 or kinds == ["float64"]:
        raise ValueError(f"{name} is stored as {' and '.join(kinds)}: choose one precision, as --dtype float32")
    return kinds[0]


def compare(config: VAEConfig, source: Tensors, written: Tensors) -> list[Row]:
    """Counts, for each part of the model, the tensors that equal their source; CheckFailed where one does not."""
    model = registry.abstract(config)
    names, targets = match(model, source.shapes()), match(model, written.shapes())
    tensors, sizes, different, damaged = Counter(), Counter(), [], []
    for key, name in names.items():
        part, after = key.split(".")[0], written.read(targets[key])
        before = source.read(name).astype(after.dtype, copy=False).reshape(after.shape)
        tensors[part] += 1
        sizes[part] += after.size
        different += [key] if before.tobytes() != after.tobytes() else []
        damaged += [] if is_finite(before) else [name]
    if different or len(written.shapes()) != len(names):
        raise CheckFailed(f"nothing is written, as these tensors differ from their source: {', '.join(different)}")
    warn_of(damaged)
    rows = [(part, tensors[part], sizes[part], tensors[part]) for part in tensors]
    return [*rows, ("all", tensors.total(), sizes.total(), tensors.total())]


def is_finite(tensor: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(np.isfinite(tensor).all())


def warn_of(damaged: list[str]) -> None:
    """Prints a warning that names tensors whose values are not all finite, if there are any."""
    if damaged:
        what = f"warning: {counted(len(damaged), 'tensor')} of the weights not finite (NaN or infinity)"
        note(f"{what}, so that what they compute is not either: {', '.join(first_few(damaged))}")


def check_target(dst: Path, src: str, overwrite: bool) -> None:
    """Raises unless `dst` can become the new checkpoint's folder without harm to anything else."""
    check_folder(dst)
    check_apart(dst, Path(src))
    held = sorted(path.name for path in dst.iterdir()) if dst.exists() else []
    if others := set(held) - {CONFIG_FILE, WEIGHTS_FILE}:
        raise ValueError(f"{dst}: holds other files, {', '.join(sorted(others))}; write to another folder")
    if held and not overwrite:
        raise ValueError(f"{dst}: holds a checkpoint; give --overwrite to replace it")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its place at a clean exit and is removed at any other."""
    with scratch(path.absolute().with_name(f".{uuid.uuid4().hex}")) as folder:
        part = folder / path.name
        part.mkdir()
        yield part
        if path.exists():
            os.replace(path, folder / "old")
        os.replace(part, path)
