"""The result of a training run: the ema of its weights, as a model."""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from flax_vae.families import registry
from flax_vae.io.files import PathLike
from flax_vae.models.vae import VideoVAE
from flax_vae.train.checkpoints import CHECKPOINTS, restore_part

MODEL = "model.json"  # the model's config, in the folder of a run


def averaged(
    folder: PathLike, step: Literal["newest", "best"] | int = "newest", dtype: DTypeLike = jnp.float32
) -> tuple[VideoVAE, int]:
    """Loads the ema of a run's weights, cast to `dtype`; returns the model and the step of its checkpoint.

    "best" is the checkpoint with the highest PSNR of the clips that the run shows. The run may still go on. Raises
    FileNotFoundError where there is no such run or checkpoint.
    """
    folder = Path(folder)
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"{folder}: no folder of a training run, which has a {MODEL}")
    vae = registry.abstract(registry.config_from_json(folder / MODEL))
    part, number = restore_part(folder / CHECKPOINTS, {"ema": nnx.state(vae, nnx.Param)}, step)
    nnx.update(vae, jax.tree.map(lambda leaf: leaf.astype(dtype), part["ema"]))
    vae.eval()
    return vae, number
