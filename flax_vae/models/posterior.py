"""The distribution of latents that the encoder gives: b batch, t frames, h w latent pixels, z channels."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flax_vae.ops.window import wide_dtype

Latents = Float[Array, "b t h w z"]
LOGVAR_RANGE = (-30.0, 20.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions, one for every latent value (Kingma & Welling 2014)."""

    mean: Latents
    logvar: Latents

    @classmethod
    def from_moments(cls, moments: Float[Array, "b t h w moments"]) -> "DiagonalGaussian":
        """Splits the channels into mean | logvar and clamps logvar to [-30, 20]; ValueError for an odd number."""
        if moments.shape[-1] % 2:
            raise ValueError(f"moments are mean | logvar, an even number of channels, got {moments.shape}")
        mean, logvar = jnp.split(moments, 2, axis=-1)
        lowest, highest = LOGVAR_RANGE
        # Not jnp.clip, whose gradient is a half where a value is just at the limit; torch's is one.
        logvar = jnp.where(logvar < lowest, lowest, jnp.where(logvar > highest, highest, logvar))
        return cls(mean, logvar)

    @property
    def std(self) -> Latents:
        """The standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    def mode(self) -> Latents:
        """Gives the most likely latents, which is the mean."""
        return self.mean

    def sample(self, key: PRNGKeyArray) -> Latents:
        """Draws latents: mean + std * standard normal noise; a key gives the same noise in every precision."""
        return self.at(jax.random.normal(key, self.mean.shape, jnp.float32))

    def at(self, noise: Latents) -> Latents:
        """Gives the latents that standard normal noise stands for: mean + std * noise."""
        return self.mean + self.std * noise.astype(self.mean.dtype)

    def kl(self) -> Float[Array, ""]:
        """Gives the divergence from the standard normal distribution, in nats, as float32 or better.

        Summed over frames, rows and columns, averaged over batch and channels, as the public training does.
        """
        wide = wide_dtype(self.mean)
        mean, logvar = self.mean.astype(wide), self.logvar.astype(wide)
        terms = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3)).mean()
