"""How a command gets its model: its config at once, its weights when everything else has been checked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_vae.cli.screen import note

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flax_vae.io.checkpoint import Checkpoint
    from flax_vae.models.config import VAEConfig
    from flax_vae.models.vae import CausalVideoVAE
    from flax_vae.runtime.tile import LossyTiles


def read_config(checkpoint: str, config: Path | None = None) -> VAEConfig:
    """Reads a checkpoint's config and its headers, but no weights; `config` stands in for its config.json."""
    from flax_vae.io.checkpoint import open_checkpoint

    with open_checkpoint(checkpoint) as source:
        return config_of(source, config)


def config_of(source: Checkpoint, config: Path | None) -> VAEConfig:
    """Gives an open checkpoint's config, or the one in the file that stands in for it."""
    from flax_vae.models.config import VAEConfig

    return VAEConfig.from_dict(source.config()) if config is None else VAEConfig.from_json(config)


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory, what is run of it (itself, or in lossy tiles), and the hash of its weights."""

    checkpoint: CausalVideoVAE
    vae: CausalVideoVAE | LossyTiles
    weights: str

    @property
    def identity(self) -> dict[str, object]:
        """All of the model and the machine that decides over the bits of a result."""
        import jax

        tiles = getattr(self.vae, "tiling", None)
        device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        return {"config": self.config_hash, "weights": self.weights, "tiles": tiles, "device": device}

    @property
    def config_hash(self) -> str:
        """The hash of the model's config."""
        return config_hash(self.vae.config)


def load(checkpoint: str, lossy_tiles: bool = False) -> Model:
    """Loads a checkpoint in float32 and keeps what will be compiled for it on disk, for the next run."""
    from flax_vae.models.vae import CausalVideoVAE
    from flax_vae.runtime.tile import LossyTiles, LossyTiling

    keep_compiled()
    note(f"loading {checkpoint}")
    vae = CausalVideoVAE.from_pretrained(checkpoint)
    return Model(vae, LossyTiles(vae, LossyTiling()) if lossy_tiles else vae, weights_hash(vae))


def open_mesh(text: str | None) -> Mesh | None:
    """Gives the mesh that --mesh asks for, over all devices; ValueError where there are not as many."""
    from flax_vae.runtime.mesh import make_mesh, parse_mesh

    return None if text is None else make_mesh(parse_mesh(text))


def keep_compiled() -> None:
    """Keeps what will be compiled on disk, for the next run: where JAX_COMPILATION_CACHE_DIR says, else in a cache."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def weights_hash(vae: CausalVideoVAE) -> str:
    """Gives 16 hexadecimal digits that differ where weights do, or the precision they are loaded in."""
    import jax
    from flax import nnx

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(vae, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


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
