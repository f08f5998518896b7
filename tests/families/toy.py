"""A family of forty lines: one convolution down, one up in time and one in space, and names of its own."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx

from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.resample import SpatialUpsample, TemporalUpsample
from flax_vae.layers.sequence import Coder
from flax_vae.models.config import VAEConfig
from flax_vae.models.latents import LatentScaling
from flax_vae.models.vae import VideoVAE


@dataclass(frozen=True)
class ToyVAEConfig(VAEConfig):
    class_name: ClassVar[str] = "ToyVAE"
    z_dim: int = 2
    pixel_channels = 3
    temporal_factor = spatial_factor = 2

    @property
    def latent_channels(self) -> int:
        return self.z_dim


class Encoder(Coder):
    def __init__(self, z: int, *, rngs: nnx.Rngs):
        super().__init__(strip_rows=2)
        self.down = CausalConv3d(3, 2 * z, 3, 2 * (2,) + (2,), rngs=rngs)

    def layers(self) -> list[Any]:
        return [self.down]


class Decoder(Coder):
    def __init__(self, z: int, *, rngs: nnx.Rngs):
        super().__init__()
        self.later, self.larger = TemporalUpsample(z, rngs=rngs), SpatialUpsample(z, 3, rngs=rngs)

    def layers(self) -> list[Any]:
        return [self.later, self.larger]


class ToyVAE(VideoVAE):
    config_class = ToyVAEConfig
    layouts: ClassVar = {"diffusers": lambda key: key.replace(".", "/")}
    presets: ClassVar = {"toy": ToyVAEConfig}
    released_scalings: ClassVar = {"toy": LatentScaling(0.5, 2.0, 0.25, 4.0)}
    last_kernel = ("decoder", "larger", "conv", "conv", "kernel")

    def __init__(self, config: ToyVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder, self.decoder = Encoder(config.z_dim, rngs=rngs), Decoder(config.z_dim, rngs=rngs)
