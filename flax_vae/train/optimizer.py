"""The optimizer, its learning rate, and the exponential moving average (ema) of the weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike
from optax import contrib

from flax_vae.train.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by step of the optimizer: linear warm-up, then cosine decay to the final one.

    The first of n steps of warm-up has 1/n of the learning rate, the n-th all of it. `steps` counts batches.
    """
    updates = max(steps // config.accumulate, 1)
    warmup = max(min(config.warmup, updates), 1)
    highest, lowest = config.learning_rate, config.final_learning_rate

    def rate(count: ArrayLike) -> Array:
        number = jnp.asarray(count, jnp.result_type(float)) + 1
        share = jnp.clip((number - warmup) / max(updates - warmup, 1), 0, 1)
        falling = lowest + (highest - lowest) * jnp.square(jnp.cos(0.5 * jnp.pi * share))
        return jnp.where(number < warmup, highest * (number / warmup), falling)

    return rate


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with clipped gradients, or with Muon in place of Adam for matrices and kernels.

    Weight decay is for those alone (Loshchilov & Hutter 2019).
    """
    adam = scale_by_adam(config.beta1, config.beta2)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip),
        scale_by_muon(adam) if config.kind == "muon" else adam,
        optax.add_decayed_weights(config.weight_decay, are_kernels),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
    if config.accumulate == 1:
        return chain
    dtype = jnp.result_type(float)
    return optax.MultiSteps(chain, config.accumulate, accumulator_dtype=dtype).gradient_transformation()


def scale_by_adam(beta1: float, beta2: float, eps: float = 1e-8) -> optax.GradientTransformation:
    """Returns optax.scale_by_adam (Kingma & Ba 2015) with a bias correction 1 - beta^n as precise as float32 is.

    In float32 0.999 is off by 1e-8, and so is 1 - 0.999: early steps would be off by 6e-6 of their length.
    """
    adam = optax.scale_by_adam(beta1, beta2, eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)
        first, second = (-jnp.expm1(state.count.astype(float) * math.log(beta)) for beta in (beta1, beta2))

        def step(m: Array, v: Array) -> Array:
            return m / first.astype(m.dtype) / (jnp.sqrt(v / second.astype(v.dtype)) + eps)

        return jax.tree.map(step, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def scale_by_muon(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns Muon (Jordan 2024) for matrices and kernels, these as (inputs of an output, outputs); `adam` for others.

    Its updates are scaled to the usual length of Adam's (Liu et al. 2025), so that learning rate and weight decay mean
    the same.
    """

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,)), tree)

    def scaled(step: Array) -> Array:
        return 0.2 * max(math.prod(step.shape[:-1]), step.shape[-1]) ** 0.5 * step

    orthogonal = contrib.scale_by_muon(weight_dimension_numbers=matrices)
    muon = optax.chain(orthogonal, optax.stateless(lambda steps, _: jax.tree.map(scaled, steps)))
    labels = {True: "muon", False: "adam"}
    return optax.partition({"muon": muon, "adam": adam}, lambda tree: jax.tree.map(labels.get, are_kernels(tree)))


def are_kernels(tree: Any) -> Any:
    """Returns for each leaf whether it is a matrix or a kernel, not a bias or a scale."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def updates(state: Any) -> Any:
    """Returns the number of steps of an optimizer of `optimizer`: one for `accumulate` batches."""
    return state.gradient_step if isinstance(state, optax.MultiStepsState) else state[-1].count


def move_ema(ema: Any, parameters: Any, decay: Array) -> Any:
    """Returns the ema after one more step: decay * ema + (1 - decay) * parameters."""
    return jax.tree.map(lambda a, p: a + (1 - decay).astype(a.dtype) * (p - a), ema, parameters)
