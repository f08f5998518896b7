"""How a command gets its model: its config at once, its weights when everything else has been checked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flax_vae.cli.screen import note

if TYPE_CHECKING:
    from flax_vae.io.checkpoint import Checkpoint
    from flax_vae.models.config import VAEConfig
    from flax_vae.models.vae import CausalVideoVAE


def read_config(checkpoint: str, config: Path | None = None) -> VAEConfig:
    """Reads a checkpoint's config and its headers, but no weights; `config` stands in for its config.json."""
    from flax_vae.io.checkpoint import open_checkpoint

    with open_checkpoint(checkpoint) as source:
        return config_of(source, config)


def config_of(source: Checkpoint, config: Path | None) -> VAEConfig:
    """Gives an open checkpoint's config, or the one in the file that stands in for it."""
    from flax_vae.models.config import VAEConfig

    return VAEConfig.from_dict(source.config()) if config is None else VAEConfig.from_json(config)


def load(checkpoint: str) -> CausalVideoVAE:
    """Loads a checkpoint in float32 and keeps what will be compiled for it on disk, for the next run."""
    import jax

    from flax_vae.models.vae import CausalVideoVAE

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    note(f"loading {checkpoint}")
    return CausalVideoVAE.from_pretrained(checkpoint)


def cache_folder() -> Path:
    """Gives the folder where this platform keeps a user's caches; XDG_CACHE_HOME wins on all of them."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        base = Path(given)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ".cache"
    return base / "flax_vae" / "xla"


def config_hash(config: VAEConfig) -> str:
    """Gives 16 hexadecimal digits that differ where configs do."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
