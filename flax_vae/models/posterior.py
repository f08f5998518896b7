"""The posterior, the distribution of latents that a clip is encoded to: b t h w z, z channels of latents."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flax_vae.ops.precision import accumulation_dtype

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
        # not jnp.clip: its gradient is 1/2 where a value equals the limit, that of torch.clamp is 1
        logvar = jnp.where(logvar < lowest, lowest, jnp.where(logvar > highest, highest, logvar))
        return cls(mean, logvar)

    @property
    def std(self) -> Latents:
        """The standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    def mode(self) -> Latents:
        """Returns the most likely latents: the mean."""
        return self.mean

    def sample(self, key: PRNGKeyArray) -> Latents:
        """Draws mean + std * standard normal noise; the noise of a key is the same in every precision."""
        return self.at(jax.random.normal(key, self.mean.shape, jnp.float32))

    def at(self, noise: Latents) -> Latents:
        """Reparametrises standard normal noise: mean + std * noise."""
        return self.mean + self.std * noise.astype(self.mean.dtype)

    def kl(self) -> Float[Array, ""]:
        """Returns the KL divergence from the standard normal distribution, in nats, in float32 or better.

        Summed over frames, rows and columns, averaged over batch and channels, as the public training does.
        """
        dtype = accumulation_dtype(self.mean)
        mean, logvar = self.mean.astype(dtype), self.logvar.astype(dtype)
        terms = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
        # a mean of means: all terms are positive, so one long float32 sum drifts by several ulp
        return 0.5 * math.prod(terms.shape[1:4]) * terms.mean(axis=3).mean(axis=2).mean(axis=1).mean()
