"""One step of training the VAE and its discriminator, as one program: B batch, T frames, H W pixels, C channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add, getitem
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, UInt8

from flax_vae.metrics.lpips import LPIPS
from flax_vae.models.posterior import DiagonalGaussian
from flax_vae.models.vae import VideoVAE
from flax_vae.runtime.mesh import check_sizes, sharding, weights_spec
from flax_vae.runtime.parallel import (
    Parts,
    abstract_parts,
    lowered_for,
    map_frames,
    replicate,
    run_parts,
    shard,
    split_parts,
)
from flax_vae.runtime.sharded import check_clip
from flax_vae.train import losses
from flax_vae.train.config import TrainConfig
from flax_vae.train.discriminator_step import DiscriminatorStep, computing, global_norm, new_discriminator
from flax_vae.train.optimizer import move_ema, optimizer, schedule, updates

Frames = UInt8[ArrayLike, "b t h w c"] | Float[ArrayLike, "b t h w c"]
Metrics = dict[str, Float[Array, ""]]
LAST_STRIDE = 16  # pixels that LPIPS sees as one at its end, after four halvings; fewer for the discriminators
# On fewer pixels their last kernels are larger than what they see. XLA (of jax 0.10) then shards the sum over a kernel,
# and where another axis of the mesh has copies of a frame, it adds up the copies.
MIN_SHARDED_SIDE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, which is what a checkpoint holds."""

    step: Array  # batches so far
    parameters: Any
    ema: Any  # exponential moving average of the parameters
    optimizer: Any
    random_counts: Any  # how often each dropout has drawn
    discriminator: Any  # parameters; None without a GAN
    discriminator_optimizer: Any
    ema_logits: Any  # moving averages of the discriminator's logits, of clips and of reconstructions
    skipped: Array  # steps left out because something was not finite, in a row


class Trainer:
    """Compiles and runs the steps of a run; holds nothing that changes.

    It starts from `vae`, and from `discriminator` or, without one, random weights. Modules are abstract, made by
    `nnx.eval_shape`, where only `lower` is called. With `fsdp` the devices of `data` shard the weights and the
    optimizer's state too. Raises ValueError where the mesh does not divide the batches, or there is none for `fsdp`.
    """

    def __init__(
        self,
        config: TrainConfig,
        vae: VideoVAE,
        lpips: LPIPS | None = None,
        discriminator: nnx.Module | None = None,
        mesh: Mesh | None = None,
        fsdp: bool = False,
    ):
        if fsdp and mesh is None:
            raise ValueError("fsdp shares the weights among the devices of data: give a mesh too, as data=8")
        self.config, self.mesh = config, mesh
        self.dtype = jnp.dtype(config.precision)
        self.loss_dtype = np.promote_types(self.dtype, np.float32)  # also of the loss's cotangent
        self.optimizer = optimizer(config.optimizer, config.steps)
        self.schedule = schedule(config.optimizer, config.steps)
        self._model, self._model_config, self._last_kernel = type(vae), vae.config, vae.last_kernel
        vae.train()
        self.structure, parameters, self._counts, self._constants = nnx.split(vae, nnx.Param, nnx.RngCount, ...)
        self._lpips, self._lpips_weights = cast(Any, (None, None) if lpips is None else nnx.split(lpips))
        self.discriminator: Any = None
        if config.gan.kind != "none":
            discriminator = discriminator or new_discriminator(config, vae.config.pixel_channels)
            self.discriminator = DiscriminatorStep(config, discriminator, self.optimizer, mesh)
        self._first = parameters, self._counts, self.discriminator and self.discriminator.first_parameters
        self._shardings = None
        options: dict[str, Any] = {"donate_argnames": "state"}
        if mesh is not None:
            check_mesh(mesh, config, vae, bool(jax.tree.leaves(self._counts)))
            devices = mesh.shape["data"] if fsdp else 1  # that share a weight
            self._shardings = jax.tree_util.tree_map_with_path(
                lambda path, leaf: sharding(mesh, weights_spec(path, leaf, devices)),
                jax.eval_shape(self._start, *self._first),
            )
            options["out_shardings"] = self._shardings, sharding(mesh)
        self._compiled = jax.jit(lowered_for(mesh)(self._step), static_argnames="with_gan", **options)

    def start(self) -> TrainState:
        """Returns the state before the first step."""
        if self.mesh is None:
            return self._start(*self._first)
        return jax.jit(self._start, out_shardings=self._shardings)(*self._first)

    def _start(self, parameters: Any, counts: Any, discriminator: Any) -> TrainState:
        copy = partial(jax.tree.map, jnp.copy)
        with_gan = self.discriminator is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            parameters=copy(parameters),
            ema=copy(parameters),
            optimizer=self.optimizer.init(parameters),
            random_counts=copy(counts),
            discriminator=copy(discriminator) if with_gan else None,
            discriminator_optimizer=self.optimizer.init(discriminator) if with_gan else None,
            # arrays of their own, since a step donates the state: no buffer may be in it twice
            ema_logits=tuple(jnp.zeros((), self.loss_dtype) for _ in range(2)) if with_gan else None,
            skipped=jnp.zeros((), jnp.int32),
        )

    def step(self, state: TrainState, frames: Frames, *, with_gan: bool) -> tuple[TrainState, Metrics]:
        """Takes a step on frames (B, T, H, W, C), uint8 or in [-1, 1]; returns the state after it and its metrics.

        The given state is donated. Of several processes, each passes its own clips of the batch. Raises ValueError
        where the mesh does not divide the batch, or its frames make no whole latents.
        """
        if self.mesh is None:
            return self._compiled(state, self._lpips_weights, (frames,), with_gan=with_gan)
        weights = replicate(self._lpips_weights, self.mesh)
        return self._compiled(state, weights, shard(frames, self.mesh), with_gan=with_gan)

    def lower(self, shape: Sequence[int], *, with_gan: bool) -> jax.stages.Lowered:
        """Lowers the program of a step on uint8 batches of a shape (B, T, H, W), to be compiled ahead of time."""
        frames, weights = (*shape, self._model_config.pixel_channels), self._lpips_weights
        state = jax.eval_shape(self._start, *self._first)
        parts: Parts = (jax.ShapeDtypeStruct(frames, jnp.uint8),)
        if self.mesh is not None:
            check_sizes(self.mesh.shape, self._model_config, *shape)
            parts, replicated = abstract_parts(frames, self.mesh, jnp.uint8), sharding(self.mesh)
            state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, self._shardings)
            weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), weights)
        return self._compiled.lower(state, weights, parts, with_gan=with_gan)

    def vae(self, parameters: Any) -> VideoVAE:
        """Returns the model with these parameters, for inference."""
        vae = nnx.merge(self.structure, parameters, self._counts, self._constants, copy=True)
        vae.eval()
        return vae

    def _step(self, state: TrainState, lpips: Any, frames: Parts, with_gan: bool) -> tuple[TrainState, Metrics]:
        self._model_config.latent_frames(sum(part.shape[1] for part in frames))  # raises for others
        video = tuple(pixels(part, self.loss_dtype) for part in frames)
        key = noise_key(self.config.seed, state.step)
        reconstruct = partial(self._reconstruct, counts=state.random_counts, video=video, key=key)
        # One forward pass, whose vjp is applied to up to three cotangents: of the output, (B, T, H, W, C) in parts, and
        # of the KL divergence, whose cotangent is its weight in the loss.
        (output, kl), vjp, counts = jax.vjp(reconstruct, state.parameters, has_aux=True)
        total, metrics, cotangent = self._reconstruction_loss(lpips, output, video)
        metrics |= {"kl": kl}
        with_discriminator = state
        if with_gan:
            loss, gan_cotangent = self.discriminator.generator_loss(state.discriminator, output)
            # The adaptive weight needs both losses' gradients by the decoder's last kernel alone. XLA drops the rest of
            # these two vjps: they cost no more than the last layer. Only the vjp below runs through the whole model.
            zero = jnp.zeros((), kl.dtype)
            pair = (vjp((each, zero))[0] for each in (cotangent, gan_cotangent))
            last_kernels = (reduce(getitem, self._last_kernel, gradients)[...] for gradients in pair)
            weight = self.config.gan.weight * losses.adaptive_weight(*last_kernels)
            cotangent = jax.tree.map(lambda a, b: a + weight * b, cotangent, gan_cotangent)
            with_discriminator, more = self.discriminator.update(state, output, video)
            metrics |= {"gan": loss, "gan_weight": weight, **more}
        (gradients,) = vjp((cotangent, jnp.asarray(self.config.loss.kl, kl.dtype)))
        metrics |= {"total": total + self.config.loss.kl * kl, "gradient_norm": global_norm(gradients)}
        changes, moments = self.optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, changes)
        return self._accepted(state, with_discriminator, parameters, moments, counts, metrics)

    def _reconstruct(self, parameters, counts, video, key):
        """Returns the reconstruction in parts and the KL divergence; apart from these, the random counts after it."""
        parameters = computing(parameters, self.dtype, self.mesh)
        vae = nnx.merge(self.structure, parameters, counts, self._constants, copy=True)
        posteriors = run_parts(vae, self._model.encode_chunk, video, self.mesh, self.config.chunk)
        latents = sampled(posteriors, key, self.mesh)
        chunk = self.config.chunk and self.config.chunk // vae.config.temporal_factor
        output = run_parts(vae, self._model.decode_chunk, latents, self.mesh, chunk)
        output = tuple(part.astype(self.loss_dtype) for part in output)
        return (output, reduce(add, [posterior.kl() for posterior in posteriors])), nnx.state(vae, nnx.RngCount)

    def _reconstruction_loss(self, lpips, output, video):
        """Returns the loss, its terms, and its cotangent: the gradient by the reconstruction, in parts."""

        def loss(output):
            terms = {"mse": losses.averaged(losses.mse, output, video), "l1": losses.averaged(losses.l1, output, video)}
            if lpips is not None:
                distance = partial(nnx.merge(self._lpips, lpips), chunk=self.config.loss.lpips_frames)
                pairs = enumerate(zip(output, video, strict=True))
                frames = tuple(map_frames(distance, *pair, mesh=self.mesh, part=part) for part, pair in pairs)
                terms["lpips"] = losses.averaged(jnp.mean, frames)
            return sum(getattr(self.config.loss, name) * term for name, term in terms.items()), terms

        (total, terms), cotangent = jax.value_and_grad(loss, has_aux=True)(output)
        return total, terms, cotangent

    def _accepted(self, state, with_discriminator, parameters, moments, counts, metrics):
        """Returns the state after a step and its metrics; where a metric is not finite, the state stays as it was."""
        is_finite = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()
        before, now = (updates(moments).astype(float) for moments in (state.optimizer, moments))
        # the decay starts at 2/11, so that the ema soon forgets the weights that the run starts from
        decay = jnp.where(now > before, jnp.minimum(self.config.optimizer.ema, (1 + now) / (10 + now)), 1.0)
        after = replace(
            with_discriminator,
            parameters=parameters,
            ema=move_ema(state.ema, parameters, decay),
            optimizer=moments,
            random_counts=counts,
        )
        kept = jax.tree.map(partial(jnp.where, is_finite), after, state)
        kept = replace(kept, step=state.step + 1, skipped=jnp.where(is_finite, 0, state.skipped + 1))
        return kept, metrics | {"learning_rate": self.schedule(before), "skipped": kept.skipped}


def sampled(posteriors: Sequence[DiagonalGaussian], key: PRNGKeyArray, mesh: Mesh | None) -> Parts:
    """Draws latents of clips in parts: with the noise with which `posterior.sample` draws those of whole clips."""
    b, _, *rest = posteriors[0].mean.shape
    noise = jax.random.normal(key, (b, sum(posterior.mean.shape[1] for posterior in posteriors), *rest), jnp.float32)
    return tuple(posterior.at(part) for posterior, part in zip(posteriors, split_parts(noise, mesh), strict=True))


def check_mesh(mesh: Mesh, config: TrainConfig, vae: VideoVAE, has_dropout: bool) -> None:
    """Raises ValueError, before anything is compiled, where the mesh cannot divide this training."""
    clips, size = config.clips, (config.clips.size,) * 2
    if clips.images < 1:
        check_clip(vae, mesh, (clips.batch, clips.frames, *size), config.chunk)
    if clips.images > 0:
        check_sizes(mesh.shape, vae.config, clips.image_batch, 1, *size)
    devices = math.lcm(mesh.shape["height"], mesh.shape["width"])
    sees_frames = config.loss.lpips > 0 or config.gan.kind != "none"
    if devices > 1 and sees_frames and (clips.size < MIN_SHARDED_SIDE or clips.size % (LAST_STRIDE * devices)):
        raise ValueError(
            f"LPIPS and the discriminators see {LAST_STRIDE} pixels as one, clips.size={clips.size}, and the mesh "
            f"divides height or width among {devices}: expected a multiple of {LAST_STRIDE * devices}, "
            f"from {MIN_SHARDED_SIDE} on"
        )
    if mesh.shape["time"] > 1 and has_dropout:
        raise ValueError("dropout draws of a clip as a whole: take time=1, or a model without dropout")


def noise_key(seed: int, step: ArrayLike) -> PRNGKeyArray:
    """Returns the key of the noise with which a step samples the posterior."""
    return jax.random.fold_in(jax.random.key(seed), step)


def pixels(frames: Array, dtype: np.dtype) -> Array:
    """Returns pixels in [-1, 1]; ValueError for integers that are not uint8."""
    if frames.dtype == jnp.uint8:
        return (frames.astype(dtype) - 127.5) / 127.5
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise ValueError(f"expected frames as uint8 or as floats in [-1, 1], got {frames.dtype}")
    return frames.astype(dtype)
