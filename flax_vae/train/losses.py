"""The terms that training minimises: B batch, T frames, H W pixels, C channels; logits of any shape.

Each returns a scalar in float32 or better. The terms, their weights and their reductions are those of the public
training; R1 and LeCam are additions.
"""

import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_vae.layers.conv import Clip
from flax_vae.ops.precision import accumulation_dtype, mean

Scalar = Float[Array, ""]


def l1(video: Clip, target: Clip) -> Scalar:
    """Returns the mean absolute error."""
    return mean(jnp.abs(video - target))


def mse(video: Clip, target: Clip) -> Scalar:
    """Returns the mean squared error."""
    return mean(jnp.square(video - target))


def hinge_discriminator(real: Array, fake: Array) -> Scalar:
    """Returns the discriminator's hinge loss on logits of clips and reconstructions (Lim & Ye 2017).

    (E relu(1 - real) + E relu(1 + fake)) / 2.
    """
    return 0.5 * (mean(jax.nn.relu(1 - real)) + mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Array) -> Scalar:
    """Returns the VAE's loss against the discriminator: -E fake."""
    return -mean(fake)


def adaptive_weight(reconstruction_gradient: Array, gan_gradient: Array) -> Scalar:
    """Returns the weight that makes the GAN's gradient by the last kernel as long as the reconstruction's.

    |a| / (|b| + 1e-4), at most 1e4 (Esser, Rombach & Ommer 2021). No gradient flows through it.
    """
    a, b = (jnp.linalg.norm(x.astype(accumulation_dtype(x)).ravel()) for x in (reconstruction_gradient, gan_gradient))
    return jax.lax.stop_gradient(jnp.clip(a / (b + 1e-4), 0.0, 1e4))


def r1(discriminator: Callable[[Any], Any], clips: Any) -> Scalar:
    """Returns half the squared norm of the gradient of a clip's logits by its pixels (Mescheder et al. 2018).

    The logits of a clip are summed, the results of clips averaged. Clips, and logits, are arrays or tuples of parts.
    """

    def total(clips: Any) -> Scalar:
        logits = jax.tree.leaves(discriminator(clips))
        return reduce(add, [jnp.sum(part, dtype=accumulation_dtype(part)) for part in logits])

    parts = jax.tree.leaves(jax.grad(total)(clips))
    return 0.5 * reduce(add, [math.prod(part.shape[1:]) * mean(jnp.square(part)) for part in parts])


def lecam(real: Array, fake: Array, ema_real: Array, ema_fake: Array) -> Scalar:
    """Returns LeCam: logits are kept near the moving averages of those of the other side (Tseng et al. 2021).

    E relu(real - ema_fake)^2 + E relu(ema_real - fake)^2.
    """
    return mean(jnp.square(jax.nn.relu(real - ema_fake))) + mean(jnp.square(jax.nn.relu(ema_real - fake)))


def averaged(term: Callable[..., Scalar], *clips: tuple[Array, ...]) -> Scalar:
    """Returns a term that is a mean over frames, of clips in parts: the mean of the parts, weighted by their frames."""
    frames = sum(part.shape[1] for part in clips[0])
    return reduce(add, [part[0].shape[1] / frames * term(*part) for part in zip(*clips, strict=True)])
