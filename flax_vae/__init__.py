"""flax_vae: causal video VAEs in JAX, trainable and equal to their torch checkpoints.

The public names are imported when the first of them is used, so that the command line answers before jax is loaded.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_vae.public import *  # noqa: F403
    from flax_vae.public import __all__, __version__  # noqa: F401


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and find_spec(f"flax_vae.{name}") is not None:
        return import_module(f"flax_vae.{name}")
    public = import_module("flax_vae.public")
    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    raise AttributeError(f"module 'flax_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __getattr__("__all__")
