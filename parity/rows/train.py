"""Rows of what training minimises: losses, LPIPS, discriminators; shapes are those of the input, B T H W C."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from flax_vae.metrics import lpips
from flax_vae.train import discriminator, losses
from parity.case import KINKED_DRAWS, MANY_DRAWS, MODEL_TOLERANCE, Case, function, layer
from torch_ref.metrics import lpips as torch_lpips
from torch_ref.train import discriminator as torch_discriminator
from torch_ref.train import losses as torch_losses


def loss(name: str, *more, parts: int = 2) -> Case:
    """A row for a loss that both packages have under one name, of as many clips as the batch is cut into."""
    return function(
        name.replace("_", "-"),
        (4, 3, 5, 4, 3),
        lambda x: getattr(losses, name)(*jnp.split(x, parts), *more),
        lambda x: getattr(torch_losses, name)(*x.chunk(parts), *more),
    )


def adaptive(name: str, size: float) -> Case:
    """A row for a GAN's loss times its adaptive weight, a constant to gradients, by a reconstruction of that size."""

    def call_flax(x):
        kernel, a, b = jnp.split(x, 3)
        terms = lambda kernel: size * losses.mse(kernel, a), lambda kernel: losses.mse(jnp.sin(kernel), b)
        weight = losses.adaptive_weight(*(jax.grad(term)(kernel) for term in terms))
        return weight * terms[1](kernel)

    def call_torch(x):
        kernel, a, b = x.chunk(3)
        gan = torch_losses.mse(torch.sin(kernel), b)
        return torch_losses.adaptive_weight(size * torch_losses.mse(kernel, a), gan, kernel) * gan

    return function(name, (3, 3, 5, 4, 3), call_flax, call_torch)


class TorchLPIPS(torch.nn.Module):
    """LPIPS of torch_ref, with the names and shapes that the parameters of flax_vae's have."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        original = torch_lpips.LPIPS(widths)
        self.convs = torch.nn.ModuleList(m for m in original.net.modules() if isinstance(m, torch.nn.Conv2d))
        self.lins = torch.nn.ModuleList(torch.nn.Linear(width, 1, bias=False) for width in widths)
        self._original = (original,)  # in a tuple, where its own parameters are not found

    def forward(self, video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = {
            f"lin{i}.model.1.weight": lin.get_parameter("weight")[..., None, None] for i, lin in enumerate(self.lins)
        }
        return torch.func.functional_call(self._original[0], weights, (video, target))


def perceptual(name: str, shape: tuple, chunk: int | None = None, **kwargs) -> Case:
    """A row for LPIPS of two clips, the halves of the batch, in pixels so large that they outlive its many layers."""
    return Case(
        name,
        shape,
        build_flax=lambda: lpips.LPIPS(LPIPS_WIDTHS, rngs=nnx.Rngs(0)),
        build_torch=lambda: TorchLPIPS(LPIPS_WIDTHS),
        call_flax=lambda module, x: {"distance": module(*jnp.split(50 * x, 2), chunk)},
        call_torch=lambda module, x: {"distance": module(*(50 * x).chunk(2))},
        tolerance=MODEL_TOLERANCE,
        draws=MANY_DRAWS,
        **kwargs,
    )


def judge(name: str, shape: tuple, class_name: str, *args, **kwargs) -> Case:
    """A row for a discriminator."""
    return replace(
        layer(name, shape, class_name),
        build_flax=lambda: getattr(discriminator, class_name)(*args, rngs=nnx.Rngs(0)),
        build_torch=lambda: getattr(torch_discriminator, class_name)(*args),
        draws=KINKED_DRAWS,
        **kwargs,
    )


def judging(row: Case, name: str) -> Case:
    """A row for what a discriminator minimises, of two clips, the halves of the batch."""

    def outputs(module, losses, real, fake):
        return {"hinge": losses.hinge_discriminator(module(real), module(fake)), "r1": losses.r1(module, real)}

    return replace(
        row,
        name=name,
        call_flax=lambda module, x: outputs(module, losses, *jnp.split(x, 2)),
        call_torch=lambda module, x: outputs(module, torch_losses, *x.chunk(2)),
    )


LPIPS_WIDTHS = (8, 8, 8, 8, 8)
FRAMES_JUDGE = judge("discriminator-frames", (2, 2, 26, 32, 3), "PatchDiscriminator", (4, 6, 8))
CAUSAL_JUDGE = judge("discriminator-causal", (2, 5, 12, 17, 3), "CausalPatchDiscriminator", (4, 6, 8), 2)


CASES = [
    loss("l1"),
    loss("mse"),
    loss("hinge_discriminator"),
    loss("hinge_generator", parts=1),
    loss("lecam", 0.3, -0.2),
    adaptive("adaptive-weight", 10.0),
    adaptive("adaptive-weight-at-most-10000", 1e5),
    perceptual("lpips", (2, 2, 17, 20, 3), slow=True),
    perceptual("lpips-chunks", (2, 3, 16, 16, 3), chunk=2, slow=True),
    replace(FRAMES_JUDGE, slow_rounded=True),
    CAUSAL_JUDGE,
    judge(
        "discriminator-causal-one-frame",
        (2, 1, 12, 16, 3),
        "CausalPatchDiscriminator",
        (4, 6, 8),
        2,
        slow_rounded=True,
    ),
    judging(replace(FRAMES_JUDGE, slow=True), "discriminator-frames-losses"),
    replace(judging(CAUSAL_JUDGE, "discriminator-causal-losses"), slow=True),
]  # fmt: skip
