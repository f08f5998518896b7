"""The numbers of a training run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Weights of the losses, and the optimizer's settings, for the VAE and the discriminator alike."""

    steps: int = 100_000
    l1: float = 0.0
    mse: float = 10.0
    lpips: float = 1.0
    kl: float = 1e-12
    gan: float = 0.5
    regularizer: Literal["none", "r1", "lecam"] = "none"
    regularizer_weight: float = 1.0
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup: int = 2000
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-3
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.999
