"""`flax-vae export`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from flax_vae.cli.options import described
from flax_vae.cli.port import Overwrite, Target
from flax_vae.jobs.screen import note

Run = Annotated[Positional[Path], described("DIR", "folder of a training run, which may still go on")]
Step = Annotated[
    Literal["newest", "best"] | int,
    described("newest|best|N", "checkpoint to take; the best one has the highest PSNR of the clips shown"),
]
DType = Annotated[Literal["float32", "bfloat16", "float16"], arg(help="precision to store the weights in")]


def export(
    run: Run, out: Target, step: Step = "newest", dtype: DType = "float32", overwrite: Overwrite = False
) -> None:
    """Writes the weights of a training run, averaged over its last steps, as a checkpoint in the public layout.

    OUT gets config.json and diffusion_pytorch_model.safetensors, which load in flax_vae and in torch.

    Example:
      flax-vae export my_run my_vae --dtype bfloat16
    """
    import numpy as np

    from flax_vae.jobs.port import check_target, replacing_folder
    from flax_vae.train.averaged import averaged

    check_target(out, str(run), overwrite)
    vae, number = averaged(run, step, np.dtype(dtype))
    with replacing_folder(out) as part:
        vae.save_pretrained(part)
    note(f"wrote {out}, the weights of step {number}; try flax-vae reconstruct clip.mp4 again.mp4 --weights {out}")
