"""The public names of flax_vae, in one list; `import flax_vae` brings them in when the first one is used."""

from importlib.metadata import PackageNotFoundError, version

from flax_vae.families.pyramid import CausalVideoVAE, CausalVideoVAEConfig
from flax_vae.families.registry import from_pretrained
from flax_vae.io.pixels import to_float, to_uint8
from flax_vae.layers.sequence import Execution
from flax_vae.models.latents import LatentScaling
from flax_vae.models.posterior import DiagonalGaussian
from flax_vae.models.vae import VideoVAE
from flax_vae.runtime import sharded, stream
from flax_vae.runtime.mesh import make_mesh
from flax_vae.runtime.tile import LossyTiles, LossyTiling

try:
    __version__ = version("flax_vae")
except PackageNotFoundError:  # run from a clone that is not installed
    __version__ = "0+clone"

__all__ = [
    "CausalVideoVAE",
    "CausalVideoVAEConfig",
    "DiagonalGaussian",
    "Execution",
    "LatentScaling",
    "LossyTiles",
    "LossyTiling",
    "VideoVAE",
    "__version__",
    "from_pretrained",
    "make_mesh",
    "sharded",
    "stream",
    "to_float",
    "to_uint8",
]
