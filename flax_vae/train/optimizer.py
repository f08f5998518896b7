"""The optimizer and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jaxtyping import Array

from flax_vae.train.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Gives the learning rate by step of the optimizer: linear warm-up, then a cosine down to the final one."""
    updates = max(steps // config.accumulate, 1)
    warmup = min(config.warmup, updates - 1)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, updates, config.final_learning_rate)


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gives AdamW with clipped gradients; weight decay is for matrices and kernels alone (Loshchilov & Hutter 2019)."""
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda parameters: jax.tree.map(lambda leaf: leaf.ndim > 1, parameters),
        ),
    )
    if config.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, config.accumulate).gradient_transformation()


def updates(state: Any) -> Any:
    """Counts the steps that an optimizer of `optimizer` has made; of the batches, one in `accumulate` is one."""
    if isinstance(state, optax.MultiStepsState):
        return state.gradient_step
    return optax.tree_utils.tree_get(state[1][0], "count")


def moved_average(average: Any, parameters: Any, decay: Array) -> Any:
    """Gives the moving average after one more step: decay * average + (1 - decay) * parameters."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, parameters)
