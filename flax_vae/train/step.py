"""One step of training the VAE and its discriminator, as one program: B batch, T frames, H W pixels, C channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, UInt8

from flax_vae.metrics.lpips import LPIPS
from flax_vae.models.config import VAEConfig
from flax_vae.models.posterior import DiagonalGaussian
from flax_vae.models.vae import CausalVideoVAE
from flax_vae.ops.geometry import latent_frames
from flax_vae.runtime.mesh import check_sizes, placed, weights_spec
from flax_vae.runtime.parallel import (
    Parts,
    abstract,
    check_clip,
    everywhere,
    in_parts,
    of_frames,
    parts_of,
    put,
    traced_for,
)
from flax_vae.train import losses
from flax_vae.train.config import TrainConfig
from flax_vae.train.discriminator import CausalPatchDiscriminator, PatchDiscriminator
from flax_vae.train.optimizer import moved_average, optimizer, schedule, updates

Frames = UInt8[ArrayLike, "b t h w 3"] | Float[ArrayLike, "b t h w 3"]
Metrics = dict[str, Float[Array, ""]]
DISCRIMINATORS = {"frames": PatchDiscriminator, "causal": CausalPatchDiscriminator}
LECAM_DECAY = 0.99
LAST_STRIDE = 16  # of LPIPS, after four halvings; the discriminators' is less
# On fewer pixels their last kernels are larger than what they see. XLA (of jax 0.10) then divides the sum over a kernel
# among devices, and where another axis of the mesh has copies of a frame, it adds up the copies.
SMALLEST_DIVIDED = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run changes: what a checkpoint of it holds."""

    step: Array  # batches so far
    parameters: Any
    average: Any  # moving average of the parameters
    optimizer: Any
    random_counts: Any  # how often each dropout has drawn
    discriminator: Any  # parameters; None without a GAN
    discriminator_optimizer: Any
    usual_logits: Any  # moving averages of the discriminator's logits, of clips and of reconstructions
    skipped: Array  # steps left out because something was not finite, in a row


class Trainer:
    """Builds a run's models and makes its steps; holds nothing that changes.

    The discriminator starts from the one given, else from random weights; `compiler_options` are those of `jax.jit`.
    With a `mesh` its devices share the work, and with `fsdp` those of `data` also the weights. The models may
    be abstract, made by `nnx.eval_shape`, of which only `lower` can be called.
    """

    def __init__(
        self,
        config: TrainConfig,
        vae: CausalVideoVAE,
        lpips: LPIPS | None = None,
        discriminator: nnx.Module | None = None,
        compiler_options: dict[str, Any] | None = None,
        mesh: Mesh | None = None,
        fsdp: bool = False,
    ):
        if fsdp and mesh is None:
            raise ValueError("fsdp shares the weights among the devices of data: give a mesh too, as data=8")
        self.config, self.mesh = config, mesh
        self.dtype = jnp.dtype(config.precision)
        self.wide = np.promote_types(self.dtype, np.float32)  # of losses and of their gradients by the reconstruction
        self.optimizer = optimizer(config.optimizer, config.steps)
        self.schedule = schedule(config.optimizer, config.steps)
        self._vae_config = vae.config
        vae.train()
        self.structure, self._parameters, self._counts, self._constants = nnx.split(vae, nnx.Param, nnx.RngCount, ...)
        self._lpips: Any = None
        self._lpips_weights: Any = None
        if lpips is not None:
            self._lpips, self._lpips_weights = nnx.split(lpips)
        self._judge: Any = None
        self._judge_parameters: Any = None
        if config.gan.kind != "none":
            judge = discriminator or DISCRIMINATORS[config.gan.kind](rngs=nnx.Rngs(config.seed + 1))
            self._judge, self._judge_parameters = nnx.split(judge, nnx.Param)
        self._first = self._parameters, self._counts, self._judge_parameters
        self._places = None
        options: dict[str, Any] = {"donate_argnames": "state", "compiler_options": compiler_options}
        if mesh is not None:
            check_mesh(mesh, config, vae.config)
            self._places = places(jax.eval_shape(self._start, *self._first), mesh, fsdp)
            options["out_shardings"] = self._places, placed(mesh)
        self._compiled = jax.jit(self._step, static_argnames="with_gan", **options)

    def start(self) -> TrainState:
        """Gives the state before the first step."""
        if self.mesh is None:
            return self._start(*self._first)
        return jax.jit(self._start, out_shardings=self._places)(*self._first)

    def _start(self, parameters: Any, counts: Any, judge: Any) -> TrainState:
        copy = partial(jax.tree.map, jnp.copy)
        with_judge = self._judge is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=copy(parameters),
            average=copy(parameters),
            optimizer=self.optimizer.init(parameters),
            random_counts=copy(counts),
            discriminator=copy(judge) if with_judge else None,
            discriminator_optimizer=self.optimizer.init(judge) if with_judge else None,
            usual_logits=(jnp.zeros((), self.wide), jnp.zeros((), self.wide)) if with_judge else None,
            skipped=jnp.zeros((), jnp.int32),
        )

    def step(self, state: TrainState, frames: Frames, *, with_gan: bool) -> tuple[TrainState, Metrics]:
        """Takes a step on a batch of pixels, uint8 or in [-1, 1]; gives the state after it and what it has measured.

        The state given is used up: its memory becomes that of the one after. Of several processes, each gives its own
        clips of the batch. Raises ValueError where the mesh does not divide the batch.
        """
        if self.mesh is None:
            return self._compiled(state, self._lpips_weights, (frames,), with_gan=with_gan)
        weights = everywhere(self._lpips_weights, self.mesh)
        return self._compiled(state, weights, put(frames, self.mesh), with_gan=with_gan)

    def lower(self, shape: Sequence[int], *, with_gan: bool) -> jax.stages.Lowered:
        """Gives the program of a step on uint8 batches of a shape (B, T, H, W), to be compiled ahead of time."""
        frames, state, weights = (*shape, 3), jax.eval_shape(self._start, *self._first), self._lpips_weights
        parts: Parts = (jax.ShapeDtypeStruct(frames, jnp.uint8),)
        if self.mesh is not None:
            check_sizes(self.mesh.shape, self._vae_config, *shape)
            parts, everyone = abstract(frames, self.mesh, jnp.uint8), placed(self.mesh)
            state = jax.tree.map(on, state, self._places)
            weights = jax.tree.map(lambda x: on(x, everyone), weights)
        return self._compiled.lower(state, weights, parts, with_gan=with_gan)

    def vae(self, parameters: Any) -> CausalVideoVAE:
        """Gives the model with these parameters, for inference."""
        vae = nnx.merge(self.structure, parameters, self._counts, self._constants, copy=True)
        vae.eval()
        return vae

    def _step(self, state: TrainState, lpips: Any, frames: Parts, with_gan: bool) -> tuple[TrainState, Metrics]:
        with traced_for(self.mesh):
            return self._traced_step(state, lpips, frames, with_gan)

    def _traced_step(self, state, lpips, frames, with_gan):
        latent_frames(sum(part.shape[1] for part in frames), self._vae_config.temporal_factor)
        video = tuple(pixels(part, self.wide) for part in frames)
        key = noise_key(self.config.seed, state.step)
        reconstruct = partial(self._reconstruct, counts=state.random_counts, video=video, key=key)
        (again, kl), pull, counts = jax.vjp(reconstruct, state.parameters, has_aux=True)
        total, metrics, gradient = self._reconstruction_loss(lpips, again, video)
        metrics |= {"kl": kl}
        judged = state
        if with_gan:
            weight, gan, gan_gradient = self._gan_loss(state, again, gradient, pull)
            gradient = jax.tree.map(lambda a, b: a + weight * b, gradient, gan_gradient)
            judged, more = self._judge_step(state, again, video)
            metrics |= {"gan": gan, "gan_weight": weight, **more}
        (gradients,) = pull((gradient, jnp.asarray(self.config.loss.kl, kl.dtype)))
        metrics |= {"total": total + self.config.loss.kl * kl, "gradient_norm": global_norm(gradients)}
        changes, moments = self.optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, changes)
        return self._accepted(state, judged, parameters, moments, counts, metrics)

    def _reconstruct(self, parameters, counts, video, key):
        parameters = self._gathered(cast(parameters, self.dtype))
        vae = nnx.merge(self.structure, parameters, counts, self._constants, copy=True)
        posteriors = in_parts(vae, CausalVideoVAE.encode_chunk, video, self.mesh, self.config.chunk)
        latents = sampled(posteriors, key, self.mesh)
        chunk = self.config.chunk and self.config.chunk // vae.config.temporal_factor
        again = in_parts(vae, CausalVideoVAE.decode_chunk, latents, self.mesh, chunk)
        again = tuple(part.astype(self.wide) for part in again)
        return (again, losses.added([posterior.kl() for posterior in posteriors])), nnx.state(vae, nnx.RngCount)

    def _gathered(self, parameters):
        """Gives every device all of the parameters, so that XLA divides the clips by them and not their channels."""
        return parameters if self.mesh is None else jax.lax.with_sharding_constraint(parameters, placed(self.mesh))

    def _reconstruction_loss(self, lpips, again, video):
        """Gives the loss, its terms, and its gradient by the reconstruction."""
        weights = self.config.loss

        def loss(again):
            terms = {"mse": losses.averaged(losses.mse, again, video), "l1": losses.averaged(losses.l1, again, video)}
            if lpips is not None:
                terms["lpips"] = losses.averaged(jnp.mean, self._distances(lpips, again, video))
            return sum(getattr(weights, name) * term for name, term in terms.items()), terms

        (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(again)
        return total, terms, gradient

    def _distances(self, lpips, again, video):
        """Gives the LPIPS of each frame, in parts."""

        distances = partial(nnx.merge(self._lpips, lpips), chunk=self.config.loss.lpips_frames)
        pairs = enumerate(zip(again, video, strict=True))
        return tuple(of_frames(distances, *pair, mesh=self.mesh, part=part) for part, pair in pairs)

    def _gan_loss(self, state, again, gradient, pull):
        """Gives the weight of the GAN's loss, that loss, and its gradient by the reconstruction."""

        def loss(again):
            return losses.averaged(losses.hinge_generator, self._logits(state.discriminator, again))

        gan, gan_gradient = jax.value_and_grad(loss)(again)
        nothing = jnp.zeros((), gan.dtype)
        last = [pull((g, nothing))[0]["decoder"]["conv_out"]["conv"]["kernel"][...] for g in (gradient, gan_gradient)]
        return self.config.gan.weight * losses.adaptive_weight(*last), gan, gan_gradient

    def _logits(self, parameters, clips):
        """Gives the discriminator's logits of clips in parts, computed in the run's precision."""
        judge = nnx.merge(self._judge, self._gathered(cast(parameters, self.dtype)))
        logits = in_parts(judge, type(judge).chunk, tuple(clip.astype(self.dtype) for clip in clips), self.mesh)
        return tuple(part.astype(self.wide) for part in logits)

    def _judge_step(self, state, again, video):
        """Gives the state with the discriminator after its step, and its losses."""
        (_, (hinge, extra, *logits)), gradients = jax.value_and_grad(self._judge_loss, has_aux=True)(
            state.discriminator, state.usual_logits, again, video
        )
        changes, moments = self.optimizer.update(gradients, state.discriminator_optimizer, state.discriminator)
        usual = tuple(LECAM_DECAY * u + (1 - LECAM_DECAY) * x for u, x in zip(state.usual_logits, logits, strict=True))
        metrics = {"discriminator": hinge, "logits_real": logits[0], "logits_fake": logits[1], **extra}
        state = replace(
            state,
            discriminator=optax.apply_updates(state.discriminator, changes),
            discriminator_optimizer=moments,
            usual_logits=usual,
        )
        return state, metrics | {"discriminator_gradient_norm": global_norm(gradients)}

    def _judge_loss(self, parameters, usual_logits, again, video):
        """Gives what the discriminator minimises; its hinge loss, its regularizer by name, and its mean logits."""
        name, weight = self.config.gan.regularizer, self.config.gan.regularizer_weight
        real, fake = (self._logits(parameters, clips) for clips in (video, again))
        hinge, extra = losses.averaged(losses.hinge_discriminator, real, fake), {}
        if name == "r1":
            extra = {name: losses.r1(partial(self._logits, parameters), video)}
        elif name == "lecam":
            extra = {name: losses.averaged(lambda *logits: losses.lecam(*logits, *usual_logits), real, fake)}
        total = hinge + weight * sum(extra.values())
        return total, (hinge, extra, *(losses.averaged(jnp.mean, logits) for logits in (real, fake)))

    def _accepted(self, state, judged, parameters, moments, counts, metrics):
        """Gives the state after a step; where anything is not finite, the one before it, with its step counted."""
        is_finite = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()
        before, now = (updates(moments).astype(float) for moments in (state.optimizer, moments))
        # early on, the average of few steps rather than of the random start
        decay = jnp.where(now > before, jnp.minimum(self.config.optimizer.ema, (1 + now) / (10 + now)), 1.0)
        after = replace(
            judged,
            parameters=parameters,
            average=moved_average(state.average, parameters, decay),
            optimizer=moments,
            random_counts=counts,
        )
        kept = jax.tree.map(partial(jnp.where, is_finite), after, state)
        kept = replace(kept, step=state.step + 1, skipped=jnp.where(is_finite, 0, state.skipped + 1))
        return kept, metrics | {"learning_rate": self.schedule(before), "skipped": kept.skipped}


def sampled(posteriors: Sequence[DiagonalGaussian], key: PRNGKeyArray, mesh: Mesh | None) -> Parts:
    """Draws latents of clips in parts: those that `posterior.sample` draws of the clips as a whole."""
    b, _, *rest = posteriors[0].mean.shape
    noise = jax.random.normal(key, (b, sum(posterior.mean.shape[1] for posterior in posteriors), *rest), jnp.float32)
    return tuple(posterior.at(part) for posterior, part in zip(posteriors, parts_of(noise, mesh), strict=True))


def places(state: TrainState, mesh: Mesh, fsdp: bool) -> Any:
    """Says where on the mesh the state lies: everywhere, but for weights that the devices of `data` share."""
    devices = mesh.shape["data"] if fsdp else 1
    return jax.tree_util.tree_map_with_path(lambda path, leaf: placed(mesh, weights_spec(path, leaf, devices)), state)


def on(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Gives the shape of an array, and where it lies."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_mesh(mesh: Mesh, config: TrainConfig, model: VAEConfig) -> None:
    """Raises ValueError, before anything is compiled, where the mesh cannot divide this training."""
    clips = config.clips
    size = (clips.size, clips.size)
    if clips.images < 1:
        check_clip(model, mesh, (clips.batch, clips.frames, *size), config.chunk)
    if clips.images > 0:
        check_sizes(mesh.shape, model, clips.image_batch, 1, *size)
    devices = math.lcm(mesh.shape["height"], mesh.shape["width"])
    is_judged = config.loss.lpips > 0 or config.gan.kind != "none"
    if devices > 1 and is_judged and (clips.size < SMALLEST_DIVIDED or clips.size % (LAST_STRIDE * devices)):
        raise ValueError(
            f"LPIPS and the discriminators see {LAST_STRIDE} pixels as one, clips.size={clips.size}, and the mesh "
            f"divides height or width among {devices}: expected a multiple of {LAST_STRIDE * devices}, "
            f"from {SMALLEST_DIVIDED} on"
        )
    if mesh.shape["time"] > 1 and any([*model.encoder_block_dropout, *model.decoder_block_dropout]):
        raise ValueError("dropout draws of a clip as a whole: take time=1, or a model without dropout")


def noise_key(seed: int, step: ArrayLike) -> PRNGKeyArray:
    """Gives the key with which a step samples the posterior."""
    return jax.random.fold_in(jax.random.key(seed), step)


def pixels(frames: Array, dtype: np.dtype) -> Array:
    """Gives pixels in [-1, 1]; ValueError for integers that are not uint8."""
    if frames.dtype == jnp.uint8:
        return (frames.astype(dtype) - 127.5) / 127.5
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"expected frames as uint8 or as floats in [-1, 1], got {frames.dtype}")
    return frames.astype(dtype)


def global_norm(gradients: Any) -> Float[Array, ""]:
    """Gives the length of all gradients together."""
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)]).sum())


def cast(parameters: Any, dtype: np.dtype) -> Any:
    """Gives the parameters in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
