"""The discriminator's part of a training step: its logits, its loss for the VAE, and its own update."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from flax_vae.runtime.mesh import sharding
from flax_vae.runtime.parallel import Parts, run_parts
from flax_vae.train import losses
from flax_vae.train.config import TrainConfig
from flax_vae.train.discriminator import CausalPatchDiscriminator, PatchDiscriminator

DISCRIMINATORS = {"frames": PatchDiscriminator, "causal": CausalPatchDiscriminator}
LECAM_DECAY = 0.99  # of the moving averages of the logits


def new_discriminator(config: TrainConfig, channels: int) -> nnx.Module:
    """Builds the discriminator of a run with random weights, for clips with this number of channels."""
    return DISCRIMINATORS[config.gan.kind](in_channels=channels, rngs=nnx.Rngs(config.seed + 1))


class DiscriminatorStep:
    """Trains a discriminator, starting from the given one, beside the VAE; holds nothing that changes.

    Clips and reconstructions are in parts, as `runtime.parallel` splits them for the mesh.
    """

    def __init__(
        self, config: TrainConfig, discriminator: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh | None
    ):
        self.config, self.optimizer, self.mesh = config, optimizer, mesh
        self.dtype = jnp.dtype(config.precision)
        self.loss_dtype = np.promote_types(self.dtype, np.float32)
        self._class: Any = type(discriminator)
        self.structure, self.first_parameters = nnx.split(discriminator, nnx.Param)

    def logits(self, parameters: Any, clips: Parts) -> Parts:
        """Returns the logits of clips, computed in the run's precision."""
        discriminator = nnx.merge(self.structure, computing(parameters, self.dtype, self.mesh))
        clips = tuple(clip.astype(self.dtype) for clip in clips)
        logits = run_parts(discriminator, self._class.chunk, clips, self.mesh)
        return tuple(part.astype(self.loss_dtype) for part in logits)

    def generator_loss(self, parameters: Any, output: Parts) -> tuple[Array, Parts]:
        """Returns the VAE's loss against the discriminator, and its gradient by the reconstruction."""
        return jax.value_and_grad(lambda x: losses.averaged(losses.hinge_generator, self.logits(parameters, x)))(output)

    def update(self, state: Any, output: Parts, video: Parts) -> tuple[Any, dict[str, Array]]:
        """Returns the `TrainState` with the discriminator after its step, and its metrics."""
        (_, (hinge, extra, *logits)), gradients = jax.value_and_grad(self._loss, has_aux=True)(
            state.discriminator, state.ema_logits, output, video
        )
        changes, moments = self.optimizer.update(gradients, state.discriminator_optimizer, state.discriminator)
        ema = tuple(LECAM_DECAY * u + (1 - LECAM_DECAY) * x for u, x in zip(state.ema_logits, logits, strict=True))
        metrics = {"discriminator": hinge, "logits_real": logits[0], "logits_fake": logits[1], **extra}
        state = replace(
            state,
            discriminator=optax.apply_updates(state.discriminator, changes),
            discriminator_optimizer=moments,
            ema_logits=ema,
        )
        return state, metrics | {"discriminator_gradient_norm": global_norm(gradients)}

    def _loss(self, parameters, ema_logits, output, video):
        """Returns what the discriminator minimises; its hinge loss, its regularizer by name, and its mean logits."""
        name, weight = self.config.gan.regularizer, self.config.gan.regularizer_weight
        real, fake = (self.logits(parameters, clips) for clips in (video, output))
        hinge, extra = losses.averaged(losses.hinge_discriminator, real, fake), {}
        if name == "r1":
            extra = {name: losses.r1(partial(self.logits, parameters), video)}
        elif name == "lecam":
            extra = {name: losses.averaged(lambda *logits: losses.lecam(*logits, *ema_logits), real, fake)}
        total = hinge + weight * sum(extra.values())
        return total, (hinge, extra, *(losses.averaged(jnp.mean, logits) for logits in (real, fake)))


def global_norm(gradients: Any) -> Float[Array, ""]:
    """Returns the norm of all gradients together."""
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)]).sum())


def computing(parameters: Any, dtype: np.dtype, mesh: Mesh | None) -> Any:
    """Returns parameters as they are computed with: cast to `dtype`, and on every device of the mesh.

    Were they left sharded (FSDP), XLA would divide the channels of activations, and not the clips.
    """
    parameters = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
    return parameters if mesh is None else jax.lax.with_sharding_constraint(parameters, sharding(mesh))
