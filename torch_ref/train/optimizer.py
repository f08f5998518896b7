"""The optimizer, its learning rate, and the moving average of the weights."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torch_ref.train.recipe import Recipe


def learning_rate(recipe: Recipe, count: int) -> float:
    """The rate of an optimizer's step, counted from 0: linear warm-up, then a cosine down to the final one."""
    updates = max(recipe.steps // recipe.accumulate, 1)
    warmup = max(min(recipe.warmup, updates), 1)
    if count + 1 < warmup:
        return recipe.learning_rate * (count + 1) / warmup
    share = min((count + 1 - warmup) / max(updates - warmup, 1), 1.0)
    lowest = recipe.final_learning_rate
    return lowest + (recipe.learning_rate - lowest) * (1 + math.cos(math.pi * share)) / 2


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def clipped(gradients: Sequence[Tensor], longest: float) -> list[Tensor]:
    """Gradients whose length all together is at most `longest`."""
    norm = global_norm(gradients)
    return list(gradients) if norm < longest else [gradient / norm * longest for gradient in gradients]


class Optimizer:
    """AdamW for a module: gradients averaged over `accumulate` batches and clipped; biases and norms do not decay."""

    def __init__(self, module: nn.Module, recipe: Recipe):
        self.recipe, self.parameters = recipe, list(module.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2))
        self.updates = 0
        self.waiting: list[Sequence[Tensor]] = []

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.recipe, self.updates)

    def step(self, gradients: Sequence[Tensor]) -> bool:
        """Takes the gradients of one batch; whether the parameters have changed."""
        self.waiting.append(gradients)
        if len(self.waiting) < self.recipe.accumulate:
            return False
        averages = [torch.stack(each).mean(dim=0) for each in zip(*self.waiting, strict=True)]
        for parameter, gradient in zip(self.parameters, clipped(averages, self.recipe.clip), strict=True):
            parameter.grad = gradient
        for group in self.adamw.param_groups:
            group["lr"] = self.rate
        self.adamw.step()
        self.waiting.clear()
        self.updates += 1
        return True


@torch.no_grad()
def move_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Moves the average of a module's parameters one step on."""
    for kept, parameter in zip(average.parameters(), module.parameters(), strict=True):
        kept.lerp_(parameter, 1 - decay)
