"""flax_vae: causal video VAEs in JAX, trainable and equal to their torch checkpoints.

The public names are imported when the first of them is used, so that the command line answers before jax is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_vae.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name == "__all__" or not name.startswith("_"):
        return getattr(import_module("flax_vae.public"), name)
    raise AttributeError(f"module 'flax_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __getattr__("__all__")
