"""The terms of the training loss. Clips are B C T H W; logits have any shape."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def l1(video: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(video, target)


def mse(video: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(video, target)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator(fake: Tensor) -> Tensor:
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, gan: Tensor, last_kernel: Tensor) -> Tensor:
    """The ratio of the lengths of two losses' gradients at the decoder's last kernel; a constant to autograd."""
    gradients = (torch.autograd.grad(loss, last_kernel, retain_graph=True)[0] for loss in (reconstruction, gan))
    first, second = (gradient.norm() for gradient in gradients)
    return (first / (second + 1e-4)).clamp(0, 1e4).detach()


def r1(discriminator: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
    """Half the squared length of the logits' gradient by a clip, averaged over clips, which must require a gradient."""
    (gradient,) = torch.autograd.grad(discriminator(clips).sum(), clips, create_graph=True)
    return gradient.square().sum() / (2 * len(clips))


def lecam(real: Tensor, fake: Tensor, usual_real: Tensor, usual_fake: Tensor) -> Tensor:
    return F.relu(real - usual_fake).square().mean() + F.relu(usual_real - fake).square().mean()
