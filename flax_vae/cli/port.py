"""`flax-vae port`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from flax_vae.cli.options import Checkpoint, Config, Flag, described, flag_help
from flax_vae.jobs.screen import note, table

Target = Annotated[Positional[Path], described("DST", "folder to write")]
DType = Annotated[Literal["keep", "float32", "bfloat16", "float16"], arg(help="precision to store the weights in")]
Variant = Annotated[str | None, described("NAME", "copy of the weights, as fp16", "the one with no such name")]
Part = Annotated[
    str | None,
    described(
        "NAME",
        "part of a trainer's checkpoint to read, as model or ema",
        "the one that is a model; of several, the averaged weights",
    ),
]
Overwrite = Annotated[Flag, flag_help("replace the checkpoint in DST")]


def port(
    src: Checkpoint,
    dst: Target,
    dtype: DType = "keep",
    config: Config = None,
    overwrite: Overwrite = False,
    variant: Variant = None,
    part: Part = None,
) -> None:
    """Turns a checkpoint of any readable kind into a folder that flax_vae and torch load alike.

    DST gets config.json and diffusion_pytorch_model.safetensors in the public layout. SRC may also be a trainer's own
    checkpoint (the weights wherever it keeps them, names in any wrapper) or an old export (attention named query, key,
    value, proj_attn). What was written is read again: every tensor must equal its source, bit for bit, after the change
    of precision, or DST is not made.

    Example:
      flax-vae port downloads/checkpoint.pth my_vae --config config.json --dtype bfloat16
    """
    from flax_vae.jobs import port as job

    kind, rows = job.port(src, dst, dtype, config, overwrite, variant, part)
    table(f"{src} to {dst}, stored as {kind}", rows, ("part", "tensors", "parameters", "equal, bit for bit"))
    note(f"wrote {dst}; it loads with flax_vae.from_pretrained({str(dst)!r}), and with torch_ref's")
