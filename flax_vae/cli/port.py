"""`flax-vae port`."""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from flax_vae.cli import CheckFailed
from flax_vae.cli.options import Checkpoint, Config
from flax_vae.jobs.model import config_of
from flax_vae.jobs.screen import note, table

if TYPE_CHECKING:
    from flax_vae.io.checkpoint import Checkpoint as Source
    from flax_vae.io.weights import Tensors
    from flax_vae.models.config import VAEConfig

Target = Annotated[Path, Positional, arg(metavar="DST", help="folder to write")]
DType = Annotated[Literal["keep", "float32", "bfloat16", "float16"], arg(help="precision to store the weights in")]
Overwrite = Annotated[bool, FlagCreatePairsOff, arg(help="replace the checkpoint in DST", help_behavior_hint="")]


def port(
    src: Checkpoint, dst: Target, dtype: DType = "keep", config: Config = None, overwrite: Overwrite = False
) -> None:
    """Turns a checkpoint of any readable kind into a folder that flax_vae and torch load alike.

    DST gets config.json and diffusion_pytorch_model.safetensors in the public layout. SRC may also be a training
    checkpoint (weights under "model" or "state_dict", names with "vae." or "module.") or an old export (attention
    named query, key, value, proj_attn). What was written is read again: every tensor must equal its source, bit for
    bit, after the change of precision, or DST is not made.

    Example:
      flax-vae port downloads/checkpoint.pth my_vae --config config.json --dtype bfloat16
    """
    from flax_vae.io.checkpoint import open_checkpoint
    from flax_vae.models.vae import CausalVideoVAE

    check_target(dst, src, overwrite)
    with open_checkpoint(src) as source:
        settings = config_of(source, config)
        kind = stored_dtype(source, src) if dtype == "keep" else dtype
    note(f"reading {src}")
    with replacing_folder(dst) as part:
        # no name for the model: it is large, and no longer needed for the comparison
        CausalVideoVAE.from_pretrained(src, np.dtype(kind), settings).save_pretrained(part)
        note("comparing what was written with its source")
        with open_checkpoint(src) as source, open_checkpoint(part) as written:
            rows = compare(settings, source, written)
    table(f"{src} to {dst}, stored as {kind}", rows, ("part", "tensors", "parameters", "equal, bit for bit"))
    note(f"wrote {dst}; it loads with flax_vae.CausalVideoVAE.from_pretrained({str(dst)!r}), and with torch_ref's")


def stored_dtype(source: Source, name: str) -> str:
    """Gives the one dtype of all tensors; ValueError where they have several."""
    kinds = sorted({dtype for _, dtype in source.shapes().values()})
    if len(kinds) > 1 or kinds == ["float64"]:
        raise ValueError(f"{name} is stored as {' and '.join(kinds)}: choose one precision, as --dtype float32")
    return kinds[0]


def compare(config: VAEConfig, source: Tensors, written: Tensors) -> list[tuple[str, int, int, int]]:
    """Counts, for each part of the model, the tensors that equal their source; CheckFailed where one does not."""
    from flax import nnx

    from flax_vae.io import port as rules
    from flax_vae.models.vae import CausalVideoVAE

    model = nnx.eval_shape(lambda: CausalVideoVAE(config, rngs=nnx.Rngs(0)))
    names = rules.match(rules.parameters(model), source.shapes(), CausalVideoVAE.__name__)
    tensors, sizes, equal, different = Counter(), Counter(), Counter(), []
    for key, name in names.items():
        part, after = key.split(".")[0], written.read(key)
        before = source.read(name).astype(after.dtype, copy=False).reshape(after.shape)
        same = np.array_equal(bits(before), bits(after))
        tensors[part] += 1
        sizes[part] += after.size
        equal[part] += same
        different += [] if same else [key]
    if different or set(written.shapes()) != set(names):
        raise CheckFailed(f"nothing is written, as these tensors differ from their source: {', '.join(different)}")
    rows = [(part, tensors[part], sizes[part], equal[part]) for part in tensors]
    return [*rows, ("all", tensors.total(), sizes.total(), equal.total())]


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def check_target(dst: Path, src: str, overwrite: bool) -> None:
    """Raises unless `dst` can become the new checkpoint's folder without harm to anything else."""
    from flax_vae.io.checkpoint import CONFIG_FILE, WEIGHTS_FILE

    if dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst}: is a file; give a folder to write")
    if not dst.absolute().parent.is_dir():
        raise FileNotFoundError(f"{dst}: there is no folder {dst.parent}; create it first")
    if dst.exists() and os.path.exists(src) and os.path.samefile(dst, src):
        raise ValueError(f"{dst}: is the checkpoint that is read; write to another folder")
    held = sorted(path.name for path in dst.iterdir()) if dst.exists() else []
    if others := set(held) - {CONFIG_FILE, WEIGHTS_FILE}:
        raise ValueError(f"{dst}: holds other files, {', '.join(sorted(others))}; write to another folder")
    if held and not overwrite:
        raise ValueError(f"{dst}: holds a checkpoint; give --overwrite to replace it")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` that takes its place at a clean exit and is removed at any other."""
    part = path.absolute().with_name(f".{uuid.uuid4().hex}")
    old = part.with_name(f"{part.name}.old")
    part.mkdir()
    try:
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
