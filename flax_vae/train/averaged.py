"""What a training run has made: its averaged weights, as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from flax_vae.io.files import PathLike
from flax_vae.models.config import VAEConfig
from flax_vae.models.vae import CausalVideoVAE
from flax_vae.train.checkpoints import CHECKPOINTS, restore_part

MODEL = "model.json"  # the model's config, in the folder of a run


def averaged(
    folder: PathLike, step: Literal["newest", "best"] | int = "newest", dtype: DTypeLike = jnp.float32
) -> tuple[CausalVideoVAE, int]:
    """Loads the averaged weights of a run, cast to `dtype`, and gives the step that they are from.

    "best" is the checkpoint with the highest PSNR of the clips that the run shows. The run may still go on. Raises
    FileNotFoundError where there is no such run or checkpoint.
    """
    folder = Path(folder)
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"{folder}: no folder of a training run, which has a {MODEL}")
    vae = nnx.eval_shape(lambda: CausalVideoVAE(VAEConfig.from_json(folder / MODEL), rngs=nnx.Rngs(0)))
    part, number = restore_part(folder / CHECKPOINTS, {"average": nnx.state(vae, nnx.Param)}, step)
    nnx.update(vae, jax.tree.map(lambda leaf: leaf.astype(dtype), part["average"]))
    vae.eval()
    return vae, number
