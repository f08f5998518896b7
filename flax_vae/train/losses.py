"""What training minimises, a function a term: B batch, T frames, H W pixels, C channels; logits of any shape.

Each gives one number, in float32 or better. The terms, their weights and their reductions are those of the public
training; R1 and LeCam are additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """Gives the mean absolute error."""
    return mean(jnp.abs(video - target))


def mse(video: Clip, target: Clip) -> Scalar:
    """Gives the mean squared error."""
    return mean(jnp.square(video - target))


def hinge_discriminator(real: Array, fake: Array) -> Scalar:
    """Gives what a discriminator minimises: its logits are to be over 1 for clips and under -1 for reconstructions.

    (E relu(1 - real) + E relu(1 + fake)) / 2 (Lim & Ye 2017).
    """
    return 0.5 * (mean(jax.nn.relu(1 - real)) + mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Array) -> Scalar:
    """Gives what the VAE minimises against a discriminator: -E fake."""
    return -mean(fake)


def adaptive_weight(reconstruction_gradient: Array, gan_gradient: Array) -> Scalar:
    """Gives the weight at which the GAN's gradient by the decoder's last kernel is as long as the reconstruction's.

    |a| / (|b| + 1e-4), at most 1e4 (Esser, Rombach & Ommer 2021). No gradient goes through it.
    """
    lengths = [
        jnp.linalg.norm(x.astype(accumulation_dtype(x)).ravel()) for x in (reconstruction_gradient, gan_gradient)
    ]
    return jax.lax.stop_gradient(jnp.clip(lengths[0] / (lengths[1] + 1e-4), 0.0, 1e4))


def r1(discriminator: Callable[[Any], Any], clips: Any) -> Scalar:
    """Gives half the squared length of the gradient of a clip's logits by its pixels (Mescheder et al. 2018).

    The logits of a clip are summed, the results of clips averaged. Clips, and logits, are arrays or tuples of parts.
    """

    def total(clips: Any) -> Scalar:
        return added([jnp.sum(part, dtype=accumulation_dtype(part)) for part in jax.tree.leaves(discriminator(clips))])

    parts = jax.tree.leaves(jax.grad(total)(clips))
    return 0.5 * added([math.prod(part.shape[1:]) * mean(jnp.square(part)) for part in parts])


def averaged(term: Callable[..., Scalar], *clips: tuple[Array, ...]) -> Scalar:
    """Gives a term that is a mean over frames, of clips in parts: each part counts as many times as it has frames."""
    frames = sum(part.shape[1] for part in clips[0])
    return added([part[0].shape[1] / frames * term(*part) for part in zip(*clips, strict=True)])


def added(terms: Sequence[Scalar]) -> Scalar:
    """Adds terms up."""
    return reduce(add, terms)


def lecam(real: Array, fake: Array, usual_real: Array, usual_fake: Array) -> Scalar:
    """Keeps logits near the moving averages of those of the other side (Tseng et al. 2021).

    E relu(real - usual_fake)^2 + E relu(usual_real - fake)^2.
    """
    return mean(jnp.square(jax.nn.relu(real - usual_fake))) + mean(jnp.square(jax.nn.relu(usual_real - fake)))
