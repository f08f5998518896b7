"""The causal video VAE: B batch, T frames, H W pixels of a video; b t h w z of its latents."""

import math
from os import PathLike

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from flax_vae.io import checkpoint, port
from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.scan import checked_chunk, fit_frames, in_chunks
from flax_vae.models.config import VAEConfig
from flax_vae.models.decoder import Decoder
from flax_vae.models.encoder import Encoder
from flax_vae.models.posterior import DiagonalGaussian, Latents
from flax_vae.ops.geometry import FramePolicy, fitted_frames

Video = Float[Array, "b _ _ _ _"]  # B T H W C; only the batch is the same before and after


class CausalVideoVAE(nnx.Module):
    """Encodes video into latents and decodes them, whole or chunk by chunk, with the same results.

    Pixels are in [-1, 1]. It computes in the dtype of its weights, to which inputs are cast. Source: the layout and
    the behaviour of the public Pyramid-Flow checkpoints.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, 1, rngs=rngs)
        self.post_quant_conv = CausalConv3d(z, z, 1, rngs=rngs)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_name: str | PathLike, dtype: DTypeLike = jnp.float32, config: VAEConfig | None = None
    ) -> "CausalVideoVAE":
        """Loads a checkpoint in the public torch layout, ready for inference (dropout off).

        Args:
          path_or_hub_name: a directory with config.json and weights, a weights file, or a hub name
            "owner/name[/folder]". Weights are *.safetensors (also sharded), or .bin, .pt, .pth, which need torch.
          dtype: what the weights are cast to: float32, bfloat16, float16, or float64 where jax has it enabled.
          config: replaces config.json, for weights that come without one.

        Raises:
          FileNotFoundError: there is no such checkpoint. ValueError: a damaged or hostile file, an unsupported
          config, or tensors that are not exactly those of the model; all of them are listed.
        """
        with checkpoint.open_checkpoint(path_or_hub_name) as source:
            config = VAEConfig.from_dict(source.config()) if config is None else config
            vae = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
            port.load(vae, source, dtype)
        vae.eval()
        return vae

    def save_pretrained(self, path: str | PathLike) -> None:
        """Writes config.json and safetensors in the public torch layout into the directory `path`."""
        checkpoint.save(path, self.config.to_dict(), port.named_tensors(self))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights, in which everything is computed."""
        return self.quant_conv.conv.kernel.dtype

    def encode(self, video: Video, chunk: int | None = None, frames: FramePolicy = "error") -> DiagonalGaussian:
        """Encodes (B, T, H, W, 3), T = 8k + 1, to the distribution of latents (B, k + 1, H / 8, W / 8, z).

        8 stands for the config's factors; rows and columns are rounded up.

        Args:
          video: pixels in [-1, 1].
          chunk: frames to compute at a time, a multiple of 8, in one compiled program: the same latents, and
            gradients, in the memory of a chunk. None computes the clip as a whole.
          frames: for any other T, "pad" repeats the last frame to the next 8k + 1 (cut off the frames from T on after
            decoding), "trim" leaves the last ones out, "error" raises.

        Raises:
          ValueError: another shape, number of frames or size of chunk, or pixels that are not floating point.
        """
        check_video(video, self.config.encoder_in_channels)
        video = fit_frames(video, fitted_frames(video.shape[1], self.config.temporal_factor, frames))
        if chunk is None:
            return self.encode_chunk(video)[0]
        chunk = checked_chunk(chunk, self.config.temporal_factor)
        return in_chunks(self, CausalVideoVAE.encode_chunk, video, chunk)[0]

    def decode(self, latents: Latents, chunk: int | None = None) -> Video:
        """Decodes latents (B, k + 1, h, w, z) to video (B, 8k + 1, 8h, 8w, 3), pixels about [-1, 1].

        `chunk` latents are computed at a time, in one compiled program: the same video, and gradients, in the memory
        of a chunk and of the video. None decodes all of them as a whole.
        """
        check_video(latents, self.config.latent_channels)
        if chunk is None:
            return self.decode_chunk(latents)[0]
        return in_chunks(self, CausalVideoVAE.decode_chunk, latents, checked_chunk(chunk, 1))[0]

    def encode_chunk(self, x: Video, carry=None) -> tuple[DiagonalGaussian, object]:
        """Encodes the next frames of a stream; `carry` is None at its start, later what the last call returned.

        Chunks of 8k + 1 frames at the start and 8k later on give k + 1 and k latents; after any other number the
        frames that do not complete a latent wait in the carry.
        """
        moments, carry = self.moments_chunk(x, carry)
        return DiagonalGaussian.from_moments(moments), carry

    def moments_chunk(self, x: Video, carry=None) -> tuple[Latents, object]:
        """Gives what `encode_chunk` makes its distribution of: mean | logvar, (B, t, h, w, 2z), logvar unclamped."""
        check_video(x, self.config.encoder_in_channels)
        moments, carry = self.encoder(jnp.asarray(x, self.dtype), carry)
        moments, _ = self.quant_conv(moments, ())
        return moments, carry

    def decode_chunk(self, z: Latents, carry=None) -> tuple[Video, object]:
        """Decodes the next latents of a stream; `carry` is None at its start, later what the last call returned."""
        check_video(z, self.config.latent_channels)
        z, _ = self.post_quant_conv(jnp.asarray(z, self.dtype), ())
        return self.decoder(z, carry)


def check_video(x: Array, channels: int) -> None:
    """Raises ValueError unless `x` is B T H W C with these channels, has frames, and is floating point."""
    if x.ndim != 5 or x.shape[-1] != channels or math.prod(x.shape) == 0:
        raise ValueError(f"expected (batch, frames, height, width, {channels}), none of them 0, got {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating point values, got {x.dtype}: map pixels to [-1, 1] with flax_vae.to_float")
