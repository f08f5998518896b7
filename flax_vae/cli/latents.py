"""Latents on disk: a safetensors file with `mean` and `logvar`, (1, t, h, w, z), and what decoding them takes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

FORMAT = {"format": "flax_vae latents", "version": "1"}


@dataclass(frozen=True)
class Latents:
    """The posterior of a clip of `frames` frames of `height` x `width` pixels; `config` is the hash of its model's."""

    mean: np.ndarray
    logvar: np.ndarray
    frames: int
    height: int
    width: int
    fps: Fraction
    config: str


def save(path: Path, latents: Latents) -> None:
    """Writes latents; the file takes its name when it is complete."""
    from safetensors.numpy import save as serialize

    from flax_vae.io.files import replacing

    about = {name: str(getattr(latents, name)) for name in ("frames", "height", "width", "fps", "config")}
    tensors = {name: np.ascontiguousarray(getattr(latents, name)) for name in ("mean", "logvar")}
    with replacing(path) as part:
        part.write_bytes(serialize(tensors, metadata=FORMAT | about))


def load(path: Path) -> Latents:
    """Reads latents; FileNotFoundError, or ValueError for a file that `save` has not written."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; flax-vae encode writes latents")
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if {key: about.get(key) for key in FORMAT} != FORMAT:
                raise ValueError(f"holds no latents of version {FORMAT['version']}; flax-vae encode writes them")
            numbers = {key: int(about[key]) for key in ("frames", "height", "width")}
            mean, logvar = file.get_tensor("mean"), file.get_tensor("logvar")
            latents = Latents(mean, logvar, fps=Fraction(about["fps"]), config=about["config"], **numbers)
    except (SafetensorError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not a latents file, or damaged: {error}") from None
    return latents
