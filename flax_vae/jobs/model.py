"""How a job gets its model: the config at once, the weights when everything else has been checked."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_vae.families import registry
from flax_vae.io.checkpoint import Checkpoint
from flax_vae.jobs.options import Options
from flax_vae.jobs.pieces import PIECE_LATENTS
from flax_vae.jobs.screen import note
from flax_vae.layers.sequence import Execution
from flax_vae.models.config import VAEConfig
from flax_vae.models.vae import VideoVAE
from flax_vae.runtime.mesh import check_sizes, make_mesh, mesh_name, parse_mesh
from flax_vae.runtime.tile import LossyTiles, LossyTiling

DEFAULTS = Options()


def read_config(checkpoint: str) -> VAEConfig:
    """Reads a checkpoint's config, but no weights."""
    return registry.read_config(registry.open_source(checkpoint))


def config_of(source: Checkpoint, config: Path | None) -> VAEConfig:
    """Returns an open checkpoint's config, or the one in a file that stands in for it."""
    return registry.read_config(source) if config is None else registry.config_from_json(config)


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
        device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        if self.checkpoint.execution.frame_by_frame:
            device += ", frame by frame"
        if self.mesh is not None:
            device += f", mesh {mesh_name(self.mesh.shape)}"
        tiles = getattr(self.vae, "tiling", None)
        return {"config": config_hash(self.vae.config), "weights": self.weights, "tiles": tiles, "device": device}


def load(checkpoint: str, options: Options = DEFAULTS) -> Model:
    """Loads a checkpoint to compute with, and caches on disk what will be compiled for it.

    Raises ValueError where the mesh has another number of devices than this process.
    """
    keep_compiled()
    mesh = open_mesh(options.mesh, jax.local_devices)
    if options.lossy_tiles and mesh is not None:
        raise ValueError("--lossy-tiles are computed one after the other, on one device: leave it or --mesh out")
    if options.frame_by_frame and mesh is not None and mesh.shape["time"] > 1:
        raise ValueError(
            f"--frame-by-frame computes one after the other what --mesh {options.mesh} divides: take time=1"
        )
    note(f"loading {checkpoint}")
    vae = registry.from_pretrained(checkpoint, dtype=options.precision)
    vae.execution = Execution(frame_by_frame=options.frame_by_frame)
    return Model(vae, LossyTiles(vae, LossyTiling()) if options.lossy_tiles else vae, weights_hash(vae), mesh)


def check_stream(mesh: str | None, config: VAEConfig, sizes: Iterable[tuple[int, int]]) -> None:
    """Raises ValueError unless the mesh divides the chunks of clips of each (height, width), one clip at a time."""
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
    """Returns the mesh that --mesh asks for, over all these devices; ValueError for another number of them."""
    return None if text is None else make_mesh(parse_mesh(text), devices())


def keep_compiled() -> None:
    """Caches compiled programs on disk: where JAX_COMPILATION_CACHE_DIR says, otherwise in the user's caches."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def weights_hash(vae: VideoVAE) -> str:
    """Returns 16 hexadecimal digits that differ where weights do, or their dtype."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(vae, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Returns the folder where this platform keeps a user's caches; XDG_CACHE_HOME wins on all of them."""
    home, local = Path.home(), os.environ.get("LOCALAPPDATA")
    caches = {"darwin": home / "Library" / "Caches", "win32": Path(local or home / "AppData" / "Local")}
    base = os.environ.get("XDG_CACHE_HOME") or caches.get(sys.platform, home / ".cache")
    return Path(base) / "flax_vae" / "xla"


def config_hash(config: VAEConfig) -> str:
    """Returns 16 hexadecimal digits that differ where configs do."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
