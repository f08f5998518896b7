"""The contract of a video VAE, which names no family: B batch, T frames, H W pixels; b t h w z of latents."""

import math
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, DTypeLike, Float

from flax_vae.io import checkpoint, port
from flax_vae.layers.scan import scan_chunks
from flax_vae.layers.sequence import Coder, Execution
from flax_vae.models.config import ExtraFrames, VAEConfig
from flax_vae.models.latents import LatentScaling
from flax_vae.models.posterior import DiagonalGaussian, Latents

V = TypeVar("V", bound="VideoVAE")
Video = Float[Array, "b _ _ _ _"]  # B T H W C; only the batch is the same before and after


class VideoVAE(nnx.Module):
    """Encodes video into latents and decodes them, whole or chunk by chunk, with the same results.

    Pixels are in [-1, 1]. It computes in the dtype of its weights, to which inputs are cast. A family is a subclass
    with a constructor `Family(config, *, rngs)`, which makes `config`, `encoder` and `decoder`, and these:

    Attributes:
      config_class: the class of its config.
      layouts: by name, the map from the port's keys to the names in files; the first is diffusers', and is written.
      presets: configs by name, such as "pyramid-flow-tiny".
      released_scalings: by variant, the latent scalings that were published with diffusion models.
      last_kernel: the attribute path of the decoder's last kernel, by which the adaptive weight of a GAN is measured.
    """

    config_class: ClassVar[type[VAEConfig]]
    layouts: ClassVar[Mapping[str, port.Layout]] = {"diffusers": port.same_names}
    presets: ClassVar[Mapping[str, Callable[[], VAEConfig]]] = {}
    released_scalings: ClassVar[Mapping[str, LatentScaling]] = {}
    last_kernel: ClassVar[tuple[str, ...]]

    config: VAEConfig
    encoder: Coder
    decoder: Coder

    @classmethod
    def from_pretrained(
        cls: type[V],
        path_or_hub_name: str | PathLike,
        subfolder: str | None = None,
        dtype: DTypeLike = jnp.float32,
        config: VAEConfig | None = None,
        variant: str | None = None,
        part: str | None = None,
    ) -> V:
        """Loads a checkpoint of this family, ready for inference (dropout off).

        Args, Raises: those of `flax_vae.from_pretrained`, which finds the family by itself; here the checkpoint's
        config.json must be this family's, or `config` be given.
        """
        source = checkpoint.open_checkpoint(path_or_hub_name, subfolder, variant, part)
        return cls.load(source, cls.config_class.from_dict(source.config()) if config is None else config, dtype)

    @classmethod
    def load(cls: type[V], source: checkpoint.Checkpoint, config: VAEConfig, dtype: DTypeLike = jnp.float32) -> V:
        """Loads the weights of an open checkpoint, cast to `dtype`; ValueError where they are not the model's."""
        vae = cls.abstract(config)
        port.load(vae, source, dtype)
        vae.eval()
        return vae

    @classmethod
    def abstract(cls: type[V], config: VAEConfig) -> V:
        """Returns a model without values, for shapes and names."""
        make: Any = cls
        return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))

    def save_pretrained(self, path: str | PathLike) -> None:
        """Writes config.json and safetensors in the layout of diffusers into the directory `path`."""
        checkpoint.save(path, self.config.to_dict(), port.named_tensors(self))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights, in which everything is computed."""
        return next(node.dtype for _, node in nnx.iter_graph(self) if isinstance(node, nnx.Param))

    @property
    def execution(self) -> Execution:
        """How the model runs, in less memory and with the same values; `vae.execution = Execution(remat=True)`."""
        return self.encoder.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        self.encoder.execution = self.decoder.execution = execution

    @property
    def scaling(self) -> LatentScaling:
        """Normalises latents for a diffusion model; ValueError where several scalings were released, or none."""
        if len(self.released_scalings) != 1:
            names = ", ".join(self.released_scalings) or "there are none"
            raise ValueError(f"{type(self).__name__} has no one scaling: choose from released_scalings ({names})")
        return next(iter(self.released_scalings.values()))

    def encode(self, video: Video, chunk: int | None = None, extra_frames: ExtraFrames = "error") -> DiagonalGaussian:
        """Encodes (B, T, H, W, C) to the distribution of latents (B, t, h, w, z), shaped as `config.latent_shape` says.

        Args:
          video: pixels in [-1, 1].
          chunk: frames to compute at a time, a multiple of the temporal factor, in one compiled program: the same
            latents, and gradients, in the memory of a chunk. None computes the clip as a whole.
          extra_frames: for a T that makes no whole latents, "pad" repeats the last frame (cut off the frames from T on
            after decoding), "trim" leaves the last ones out, "error" raises.

        Raises:
          ValueError: another shape, number of frames or size of chunk, or pixels that are not floating point.
        """
        check_video(video, self.config.pixel_channels)
        video = fit_frames(video, self.config.fitted_frames(video.shape[1], extra_frames))
        if chunk is None:
            return self.encode_chunk(video)[0]
        return scan_chunks(self, type(self).encode_chunk, video, self.config.checked_chunk(chunk))[0]

    def decode(self, latents: Latents, chunk: int | None = None) -> Video:
        """Decodes latents (B, t, h, w, z) to video, as `config.video_shape` says; pixels about [-1, 1], unclamped.

        `chunk` latents are computed at a time, in one compiled program: the same video, and gradients, in the memory
        of a chunk and of the video. None decodes all of them as a whole.
        """
        check_video(latents, self.config.latent_channels)
        if chunk is None:
            return self.decode_chunk(latents)[0]
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: expected at least 1 latent")
        self.config.checked_chunk(self.config.chunk_frames(chunk))
        return scan_chunks(self, type(self).decode_chunk, latents, chunk)[0]

    def encode_chunk(self, x: Video, carry: Any = None) -> tuple[DiagonalGaussian, Any]:
        """Encodes the next frames of a stream; `carry` is None at its start, later that of the last call.

        Frames that do not complete a latent wait in the carry.
        """
        moments, carry = self.moments_chunk(x, carry)
        return DiagonalGaussian.from_moments(moments), carry

    def moments_chunk(self, x: Video, carry: Any = None) -> tuple[Latents, Any]:
        """Returns the moments behind `encode_chunk`: mean | logvar, (B, t, h, w, 2z), logvar unclamped."""
        check_video(x, self.config.pixel_channels)
        with jax.named_scope("encoder"):
            moments, carry = self.encoder(jnp.asarray(x, self.dtype), carry)
            return self.after_encoder(moments), carry

    def decode_chunk(self, z: Latents, carry: Any = None) -> tuple[Video, Any]:
        """Decodes the next latents of a stream; `carry` is None at its start, later that of the last call."""
        check_video(z, self.config.latent_channels)
        with jax.named_scope("decoder"):
            return self.decoder(self.before_decoder(jnp.asarray(z, self.dtype)), carry)

    def after_encoder(self, moments: Latents) -> Latents:
        """Maps the encoder's output, pixel by pixel, to moments (B, t, h, w, 2z)."""
        return moments

    def before_decoder(self, z: Latents) -> Latents:
        """Maps latents, pixel by pixel, to the decoder's input."""
        return z


def check_video(x: Array, channels: int) -> None:
    """Raises ValueError unless `x` is B T H W C with these channels, has frames, and is floating point."""
    if x.ndim != 5 or x.shape[-1] != channels or math.prod(x.shape) == 0:
        raise ValueError(f"expected (batch, frames, height, width, {channels}), none of them 0, got {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating point values, got {x.dtype}: map pixels to [-1, 1] with flax_vae.to_float")


def fit_frames(x: ArrayLike, frames: int) -> Array:
    """Cuts (B, T, ...) to its first `frames` frames, or repeats its last one up to that number."""
    x = jnp.asarray(x)[:, :frames]
    missing = frames - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode="edge") if missing else x
