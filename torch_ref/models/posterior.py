"""The encoder's answer: a normal distribution for every latent value. Shapes: B batch, z channels, t h w latents."""

from torch import Tensor


class DiagonalGaussian:
    """Independent normal distributions from moments, B 2z t h w: z channels of mean, then z of log variance.

    The log variance is clamped to [-30, 20]. Raises ValueError for an odd number of channels.
    """

    def __init__(self, moments: Tensor):
        if moments.shape[1] % 2:
            raise ValueError(f"moments have {moments.shape[1]} channels: expected an even number, mean | log variance")
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        """The most likely latents, B z t h w: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Latents mean + std * noise, for standard normal `noise` of the mean's shape.

        Raises ValueError for noise of another shape.
        """
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}: expected the mean's, {tuple(self.mean.shape)}")
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, a scalar: summed over (t, h, w), averaged over batch and channels."""
        per_value = 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)
        return per_value.sum(dim=(2, 3, 4)).mean()
