"""How a job gets its model: its config at once, its weights when everything else has been checked."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vae.jobs.options import Options
from flax_vae.jobs.screen import note

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from flax_vae.io.checkpoint import Checkpoint
    from flax_vae.models.config import VAEConfig
    from flax_vae.models.vae import VideoVAE
    from flax_vae.runtime.tile import LossyTiles


def read_config(checkpoint: str, config: Path | None = None) -> VAEConfig:
    """Reads a checkpoint's config and its headers, but no weights; `config` stands in for its config.json."""
    from flax_vae.families.registry import open_source

    return config_of(open_source(checkpoint), config)


def config_of(source: Checkpoint, config: Path | None) -> VAEConfig:
    """Returns an open checkpoint's config, or the one in the file that stands in for it."""
    from flax_vae.families import registry

    return registry.read_config(source) if config is None else registry.config_from_json(config)


DEFAULTS = Options()


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory, what is run of it (itself, or in lossy tiles), and the hash of its weights."""

    checkpoint: VideoVAE
    vae: VideoVAE | LossyTiles
    weights: str
    mesh: Mesh | None = None

    @property
    def identity(self) -> dict[str, object]:
        """All of the model and the machine that the bits of a result depend on."""
        import jax

        from flax_vae.runtime.mesh import mesh_name

        tiles = getattr(self.vae, "tiling", None)
        device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        if self.checkpoint.execution.frame_by_frame:
            device += ", frame by frame"
        if self.mesh is not None:
            device += f", mesh {mesh_name(self.mesh.shape)}"
        return {"config": self.config_hash, "weights": self.weights, "tiles": tiles, "device": device}

    @property
    def config_hash(self) -> str:
        """The hash of the model's config."""
        return config_hash(self.vae.config)


def load(checkpoint: str, options: Options = DEFAULTS) -> Model:
    """Loads a checkpoint to compute with, and keeps what will be compiled for it on disk, for the next run.

    The devices of a mesh, all of this process, share each chunk. Raises ValueError where there are not as many.
    """
    import jax

    from flax_vae.families import registry
    from flax_vae.layers.sequence import Execution
    from flax_vae.runtime.tile import LossyTiles, LossyTiling

    keep_compiled()
    devices = open_mesh(options.mesh, jax.local_devices)
    if options.lossy_tiles and devices is not None:
        raise ValueError("--lossy-tiles are computed one after the other, on one device: leave it or --mesh out")
    if options.frame_by_frame and devices is not None and devices.shape["time"] > 1:
        raise ValueError(
            f"--frame-by-frame computes one after the other what --mesh {options.mesh} divides: take time=1"
        )
    note(f"loading {checkpoint}")
    vae = registry.from_pretrained(checkpoint, dtype=options.precision)
    vae.execution = Execution(frame_by_frame=options.frame_by_frame)
    return Model(vae, LossyTiles(vae, LossyTiling()) if options.lossy_tiles else vae, weights_hash(vae), devices)


def check_stream(mesh: str | None, config: VAEConfig, sizes: Iterable[tuple[int, int]]) -> None:
    """Raises ValueError where a mesh does not divide the chunks of clips of these heights and widths, one at a time."""
    from flax_vae.jobs.pieces import PIECE_LATENTS
    from flax_vae.runtime.mesh import check_sizes, parse_mesh

    if mesh is None:
        return
    devices = parse_mesh(mesh)
    if PIECE_LATENTS % devices.get("time", 1):
        raise ValueError(
            f"--mesh {mesh}: a stream is cut into pieces of {PIECE_LATENTS} latents, which time must divide"
        )
    if devices.get("data", 1) > 1:
        raise ValueError(
            f"--mesh {mesh}: data divides a batch, and clips are computed one by one: take height, width or time, or "
            "several processes, each with its own clips"
        )
    for height, width in set(sizes):
        check_sizes(devices, config, 1, config.pixel_frames(PIECE_LATENTS + 1), height, width)


def open_mesh(text: str | None, devices: Callable[[], list[Any]]) -> Mesh | None:
    """Gives the mesh that --mesh asks for, over all these devices; ValueError where there are not as many."""
    from flax_vae.runtime.mesh import make_mesh, parse_mesh

    return None if text is None else make_mesh(parse_mesh(text), devices())


def keep_compiled() -> None:
    """Keeps what will be compiled on disk, for the next run: where JAX_COMPILATION_CACHE_DIR says, else in a cache."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def weights_hash(vae: VideoVAE) -> str:
    """Gives 16 hexadecimal digits that differ where weights do, or the precision they are loaded in."""
    import jax
    from flax import nnx

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(vae, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
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
