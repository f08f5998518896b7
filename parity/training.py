"""Trains a small VAE for some steps in both frameworks: same weights, same batches, same noise.

Results are handed around in torch's layout and by torch's names, as numpy float64.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_vae.io import port
from flax_vae.train.config import GanConfig, LossConfig, OptimizerConfig, TrainConfig
from flax_vae.train.step import Trainer, TrainState, noise_key
from parity import compare
from parity.case import Case
from parity.rows.pyramid import SINGLE, whole
from parity.rows.train import CAUSAL_JUDGE, FRAMES_JUDGE, perceptual
from torch_ref.train.recipe import Recipe
from torch_ref.train.step import Trainer as TorchTrainer

Precision = Literal["float32", "float64"]
TOLERANCE = 1e-9  # relative, of what a step measures
# Adam steps by what rounding leaves of gradients that are zero in theory, such as those of biases before a norm.
WEIGHT_TOLERANCE = 1e-8
STEPS = 20
CLIPS = (2, 5, 16, 16, 3)  # B T H W C of every batch
VAE, LPIPS = whole("trained", SINGLE, CLIPS), perceptual("instrument", CLIPS)
JUDGES = {"frames": FRAMES_JUDGE, "causal": CAUSAL_JUDGE}
BASE = TrainConfig(
    steps=STEPS,
    loss=LossConfig(l1=0.3, mse=10.0, lpips=1.0, kl=1e-3, lpips_frames=5),
    gan=GanConfig(kind="none"),
    optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup=5, weight_decay=0.1, ema=0.9),
)


@dataclass(frozen=True)
class Trajectory:
    """What every step has measured, and the weights after the last one: of the VAE, its average, the discriminator."""

    metrics: list[dict[str, float]]
    weights: dict[str, compare.Tensors]


def first_weights(case: Case) -> compare.Tensors:
    """Draws the weights that a part of the run starts from; LPIPS weighs features by what is not negative."""
    drawn = compare.draw(case, "float32").weights
    return {name: np.abs(value) if name.startswith("lins") else value for name, value in drawn.items()}


def batches(seed: int) -> np.ndarray:
    """Draws a batch of pixels, uint8, for each step: noise on slopes."""
    rng = np.random.default_rng(seed)
    slopes = np.linspace(0, 1, CLIPS[2])[:, None, None] * rng.uniform(-60, 60, (STEPS, *CLIPS[:2], 1, 1, 3))
    return np.clip(128 + slopes + rng.normal(0, 30, (STEPS, *CLIPS)), 0, 255).astype(np.uint8)


def run_flax(config: TrainConfig, precision: Precision, seeds: Sequence[int] = (0,)) -> list[Trajectory]:
    """Trains flax_vae, on the batches of each seed from the start."""
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        parts = {name: compare.ported(case, first_weights(case), precision) for name, case in cases(config).items()}
        trainer = Trainer(replace(config, precision=cast(Any, precision)), **parts)
        return [flax_trajectory(config, trainer, parts, seed) for seed in seeds]


def flax_trajectory(config: TrainConfig, trainer: Trainer, parts: dict[str, nnx.Module], seed: int) -> Trajectory:
    """Trains from the start."""
    state, metrics = trainer.start(), []
    for step, frames in enumerate(batches(seed)):
        state, measured = trainer.step(state, frames, with_gan=config.gan.takes_part(step))
        metrics.append({name: float(value) for name, value in measured.items()})
    return Trajectory(metrics, flax_weights(parts, state))


def flax_weights(parts: dict[str, nnx.Module], state: TrainState) -> dict[str, compare.Tensors]:
    """Names the weights of a state."""
    states = {"parameters": ("vae", state.parameters), "average": ("vae", state.ema)}
    if "discriminator" in parts:
        states["discriminator"] = ("discriminator", state.discriminator)
    named = {name: port.torch_layout(parts[part], weights) for name, (part, weights) in states.items()}
    return {name: {key: value.astype(np.float64) for key, value in each.items()} for name, each in named.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch compute in one thread: layers so small take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run_torch(config: TrainConfig, precision: Precision, seed: int = 0) -> Trajectory:
    """Trains torch_ref."""
    dtype = compare.DTYPES[precision]
    parts: dict[str, Any] = {}
    for name, case in cases(config).items():
        parts[name] = case.build_torch().to(dtype)
        parts[name].load_state_dict({key: torch.from_numpy(value) for key, value in first_weights(case).items()})
    trainer, metrics = TorchTrainer(recipe=recipe(config), **parts), []
    for step, frames in enumerate(batches(seed)):
        clips = torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, 1)))
        metrics.append(trainer.step(clips, noise(config, step).to(dtype), config.gan.takes_part(step)))
    modules = {"parameters": trainer.vae, "average": trainer.average, "discriminator": trainer.discriminator}
    named = {name: module.named_parameters() for name, module in modules.items() if module is not None}
    return Trajectory(metrics, {name: {k: compare.to_numpy(v) for k, v in each} for name, each in named.items()})


def check_same(ours: Trajectory, expected: Trajectory) -> None:
    """AssertionError when what a step measures, or a weight after the last one, is further off than it may be."""
    for step, (mine, true) in enumerate(zip(ours.metrics, expected.metrics, strict=True)):
        assert mine.keys() == true.keys(), f"step {step} measures {sorted(mine)} instead of {sorted(true)}"
        for name, value in true.items():
            off = abs(mine[name] - value)
            assert off <= TOLERANCE * abs(value), f"step {step}: {name} is {mine[name]} instead of {value}"
    assert ours.weights.keys() == expected.weights.keys()
    for part, weights in expected.weights.items():
        worst = max(largest for largest, _ in compare.relative_errors(ours.weights[part], weights, part))
        assert worst <= WEIGHT_TOLERANCE, f"{part}: relative error {worst:.2e} exceeds {WEIGHT_TOLERANCE:.0e}"


def errors(actual: Trajectory, expected: Trajectory) -> dict[str, float]:
    """Returns the rms error over the steps of what they measure, in ulp of float32 of the largest true value."""
    found = {}
    for name in expected.metrics[-1]:
        steps = [step for step, metrics in enumerate(expected.metrics) if name in metrics]
        mine, true = (np.array([run.metrics[step][name] for step in steps]) for run in (actual, expected))
        largest = np.abs(true).max() or 1.0
        found[name] = float(np.sqrt(np.square((mine - true) / largest).mean()) / np.finfo(np.float32).eps)
    return found


def check_no_worse(ours: list[Trajectory], torchs: list[Trajectory], expected: list[Trajectory]) -> None:
    """AssertionError when the usual run of ours is further from the truth than `compare.LIMITS` allow.

    The usual one of some runs: in any of them rounding may lead to the other side of a kink.
    """
    times, floor = compare.LIMITS["rms"]
    mine, other = ([errors(*pair) for pair in zip(runs, expected, strict=True)] for runs in (ours, torchs))
    for name in mine[0]:
        error, limit = (float(np.median([run[name] for run in runs])) for runs in (mine, other))
        limit = max(floor, times * limit)
        assert error <= limit, f"{name}: rms error {error:.2f} ulp, limit {limit:.2f}"


def cases(config: TrainConfig) -> dict[str, Case]:
    """Returns the parts that a run is made of."""
    found = {"vae": VAE, "lpips": LPIPS}
    return found | ({} if config.gan.kind == "none" else {"discriminator": JUDGES[config.gan.kind]})


def noise(config: TrainConfig, step: int) -> torch.Tensor:
    """Returns the noise, B z t h w, that flax_vae samples the posterior of a step with."""
    shape = (CLIPS[0], *SINGLE.latent_shape(*CLIPS[1:4]))
    key = noise_key(config.seed, step)
    return torch.from_numpy(np.moveaxis(np.array(jax.random.normal(key, shape, jnp.float32)), -1, 1).copy())


def recipe(config: TrainConfig) -> Recipe:
    """Says in torch_ref's words what a config with AdamW says."""
    values = vars(config.loss) | vars(config.optimizer)
    assert values.pop("kind") == "adamw"
    del values["lpips_frames"]
    return Recipe(
        steps=config.steps,
        gan=config.gan.weight,
        regularizer=config.gan.regularizer,
        regularizer_weight=config.gan.regularizer_weight,
        **values,
    )
