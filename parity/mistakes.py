"""Mistakes that ports of a causal video VAE make, each as what the layer would then compute, in torch.

They serve twice: a check that does not notice them proves nothing, and when a layer departs from its reference, the
mistake that reproduces its output names the cause. Shapes: B C T H W.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_ref.layers.attention import Attention
from torch_ref.layers.conv import CausalConv3d
from torch_ref.layers.norm import CausalGroupNorm
from torch_ref.layers.resample import SpatialUpsample, TemporalUpsample
from torch_ref.layers.resnet import CausalResnetBlock
from torch_ref.metrics.lpips import Weighting
from torch_ref.models.posterior import DiagonalGaussian
from torch_ref.runtime.tile import LossyTiling, Tiles, blended, joined
from torch_ref.train import losses, optimizer, step
from torch_ref.train.optimizer import Optimizer
from torch_ref.train.recipe import Recipe
from torch_ref.train.step import Trainer


@dataclass(frozen=True)
class Mistake:
    """What is done wrong, in which layer or file (where more than one), and what its method then computes."""

    cause: str
    layer: type | ModuleType
    forward: Callable[..., Any]
    method: str = "forward"


def convolve(layer: CausalConv3d, x: Tensor, *, time: tuple[int, int] | None = None, **changes) -> Tensor:
    """Runs a causal convolution with another time padding, weight, stride or input."""
    causal, height, width = layer.padding
    settings = {"weight": layer.conv.weight, "stride": layer.conv.stride} | changes
    x = F.pad(x, (*width, *height, *(time or causal)))
    return F.conv3d(x, bias=layer.conv.bias, dilation=layer.conv.dilation, groups=layer.conv.groups, **settings)


def symmetric(layer: CausalConv3d, x: Tensor) -> Tensor:
    before = layer.padding[0][0]
    return convolve(layer, x, time=(before - before // 2, before // 2))


def anticausal(layer: CausalConv3d, x: Tensor) -> Tensor:
    return convolve(layer, x, time=(0, layer.padding[0][0]))


def repeated_first_frame(layer: CausalConv3d, x: Tensor) -> Tensor:
    before = layer.padding[0][0]
    return convolve(layer, torch.cat([x[:, :, :1]] * before + [x], dim=2), time=(0, 0))


def asymmetric_space(layer: CausalConv3d, x: Tensor) -> Tensor:
    time, height, width = layer.padding
    x = F.pad(x, (0, sum(width), 0, sum(height), *time))
    return F.conv3d(x, layer.conv.weight, layer.conv.bias, layer.conv.stride, 0, layer.conv.dilation, layer.conv.groups)


def norm(layer: CausalGroupNorm, x: Tensor, eps: float) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1)
    y = F.group_norm(frames, layer.num_groups, layer.weight, layer.bias, eps)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def norm_over_time(layer: CausalGroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def interleaved_groups(layer: CausalGroupNorm, x: Tensor) -> Tensor:
    """Takes channel c to be in group c % groups, where it is in c // (channels / groups)."""
    order = torch.arange(x.shape[1]).unflatten(0, (-1, layer.num_groups)).T.flatten()
    frames = x[:, order].transpose(1, 2).flatten(0, 1)
    y = F.group_norm(frames, layer.num_groups, eps=layer.eps).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    shape = (1, -1, 1, 1, 1)
    return y[:, order.argsort()] * layer.weight.view(shape) + layer.bias.view(shape)


def attend(layer: Attention, x: Tensor, scale: float, across_frames: bool = False) -> Tensor:
    b, c, t, h, w = x.shape
    pixels = layer.group_norm(x).permute(0, 2, 3, 4, 1).reshape(*((b, -1) if across_frames else (b * t, h * w)), c)
    weights = (layer.to_q(pixels) @ layer.to_k(pixels).transpose(1, 2) * scale).softmax(-1)
    return layer.to_out[0](weights @ layer.to_v(pixels)).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


def spatial_shuffle(layer: SpatialUpsample, x: Tensor, split: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    y = layer.conv(x)
    b, _, t, h, w = y.shape
    return y.unflatten(1, split).permute(order).reshape(b, -1, t, 2 * h, 2 * w)


def temporal_shuffle(layer: TemporalUpsample, x: Tensor, kept: slice, frame_first: bool = False) -> Tensor:
    y = layer.conv(x)
    b, _, t, h, w = y.shape
    y = y.unflatten(1, (2, -1)).transpose(1, 2) if frame_first else y.unflatten(1, (-1, 2))
    return y.transpose(2, 3).reshape(b, -1, 2 * t, h, w)[:, :, kept]


def residual(layer: CausalResnetBlock, x: Tensor) -> Tensor:
    """Returns what the block adds to its shortcut; the shortcut's weights still get a gradient, of zero."""
    y = layer.conv2(F.silu(layer.norm2(layer.conv1(F.silu(layer.norm1(x))))))
    return y if layer.conv_shortcut is None else y + 0 * layer.conv_shortcut(x)


def no_clamp(layer: DiagonalGaussian, moments: Tensor) -> None:
    layer.mean, layer.logvar = moments.chunk(2, dim=1)
    layer.std = (0.5 * layer.logvar).exp()


def join(
    tiles: Tiles, overlap: int, axes: tuple[int, ...] = (3, 4), in_place: bool = True, blend: Callable = blended
) -> Tensor:
    """Joins tiles with the blends in another order, with tiles that are not blended yet, or by another ramp."""
    before = [list(row) for row in tiles]
    after = before if in_place else [list(row) for row in tiles]
    for i, row in enumerate(tiles):
        for j in range(len(row)):
            for axis in axes:
                if (i if axis == 3 else j) > 0:
                    neighbour = before[i - 1][j] if axis == 3 else before[i][j - 1]
                    after[i][j] = blend(neighbour, after[i][j], overlap, axis)
    return joined([joined(row, overlap, 4) for row in after], overlap, 3)


def ahead(before: Tensor, after: Tensor, overlap: int, axis: int) -> Tensor:
    """Blends by a ramp that starts at one pixel's share instead of at none."""
    share = ((torch.arange(overlap).to(after) + 1) / overlap).view(-1, *(1,) * (after.ndim - 1 - axis))
    first, rest = after.split([overlap, after.shape[axis] - overlap], axis)
    last = before.narrow(axis, before.shape[axis] - overlap, overlap)
    return torch.cat([last * (1 - share) + first * share, rest], axis)


def attached_weight(reconstruction: Tensor, gan: Tensor, last_kernel: Tensor) -> Tensor:
    """Returns the adaptive weight as something that gradients go through."""
    terms = (reconstruction, gan)
    first, second = (torch.autograd.grad(term, last_kernel, create_graph=True)[0].norm() for term in terms)
    return (first / (second + 1e-4)).clamp(0, 1e4)


def kl_over_channels(layer: DiagonalGaussian) -> Tensor:
    terms = 0.5 * (layer.mean**2 + layer.logvar.exp() - 1.0 - layer.logvar)
    return terms.sum(dim=1).mean()


def decay_of_all(layer: Optimizer, module: torch.nn.Module, recipe: Recipe, begin: Callable = Optimizer.__init__):
    begin(layer, module, recipe)
    for group in layer.adamw.param_groups:
        group["weight_decay"] = recipe.weight_decay


def undetached(
    layer: Trainer, again: Tensor, reconstruction: Tensor, gan_loss: Callable = Trainer.gan_loss
) -> tuple[Tensor, Tensor]:
    """Adds to what the VAE minimises what the discriminator does."""
    assert layer.discriminator is not None
    gan, weight = gan_loss(layer, again, reconstruction)
    return gan + F.relu(1 + layer.discriminator(again)).mean() / 2, weight


def rough(values: Tensor) -> Tensor:
    """Rounds to bfloat16, as the default matmul precision of TPUs does."""
    return values.bfloat16().to(values)


MISTAKES = [
    Mistake("time is padded on both sides: all of it belongs in front", CausalConv3d, symmetric),
    Mistake("time is padded behind: it belongs in front", CausalConv3d, anticausal),
    Mistake("time is padded with the first frame: zeros belong there", CausalConv3d, repeated_first_frame),
    Mistake(
        "height and width are padded at their end only: k // 2 belongs on each side", CausalConv3d, asymmetric_space
    ),
    Mistake(
        "the kernel's height and width are swapped",
        CausalConv3d,
        lambda m, x: convolve(m, x, weight=m.conv.weight.transpose(3, 4)),
    ),
    Mistake(
        "the kernel's time axis is reversed", CausalConv3d, lambda m, x: convolve(m, x, weight=m.conv.weight.flip(2))
    ),
    Mistake(
        "the stride's axes are in the wrong order",
        CausalConv3d,
        lambda m, x: convolve(m, x, stride=m.conv.stride[::-1]),
    ),
    Mistake("the norm's eps is 1e-5 instead of 1e-6", CausalGroupNorm, lambda m, x: norm(m, x, 1e-5)),
    Mistake("the norm's statistics span all frames: they belong to one frame each", CausalGroupNorm, norm_over_time),
    Mistake("the norm's groups take every n-th channel: they take neighbours", CausalGroupNorm, interleaved_groups),
    Mistake(
        "the attention's input is not added to its output", Attention, lambda m, x: attend(m, x, x.shape[1] ** -0.5)
    ),
    Mistake("the attention's scale C ** -0.5 is missing", Attention, lambda m, x: x + attend(m, x, 1.0)),
    Mistake(
        "attention spans all frames: it belongs within each",
        Attention,
        lambda m, x: x + attend(m, x, x.shape[1] ** -0.5, True),
    ),
    Mistake("the shortcut is missing", CausalResnetBlock, residual),
    Mistake(
        "the pixel shuffle swaps row and column",
        SpatialUpsample,
        lambda m, x: spatial_shuffle(m, x, (-1, 2, 2), (0, 1, 4, 5, 3, 6, 2)),
    ),
    Mistake(
        "the pixel shuffle takes the row and column from the slow end of the channels",
        SpatialUpsample,
        lambda m, x: spatial_shuffle(m, x, (2, 2, -1), (0, 3, 4, 5, 1, 6, 2)),
    ),
    Mistake(
        "the first frame of the stream is not dropped",
        TemporalUpsample,
        lambda m, x: temporal_shuffle(m, x, slice(None)),
    ),
    Mistake(
        "the last frame is dropped instead of the first",
        TemporalUpsample,
        lambda m, x: temporal_shuffle(m, x, slice(0, -1)),
    ),
    Mistake(
        "the time shuffle takes the frame from the slow end of the channels",
        TemporalUpsample,
        lambda m, x: temporal_shuffle(m, x, slice(1, None), frame_first=True),
    ),
    Mistake(
        "inputs and weights are rounded to bfloat16: ask for the highest matmul precision",
        CausalConv3d,
        lambda m, x: convolve(m, rough(x), weight=rough(m.conv.weight)),
    ),
    Mistake("weights are rounded to bfloat16", CausalConv3d, lambda m, x: convolve(m, x, weight=rough(m.conv.weight))),
]
BESIDE_LAYERS = [
    Mistake("logvar is not clamped", DiagonalGaussian, no_clamp, "__init__"),
    Mistake(
        "tiles are blended with the left one first: the one above comes first",
        LossyTiling,
        lambda _, tiles, overlap: join(tiles, overlap, axes=(4, 3)),
        "join",
    ),
    Mistake(
        "tiles are blended with tiles as they were computed: with blended ones",
        LossyTiling,
        lambda _, tiles, overlap: join(tiles, overlap, in_place=False),
        "join",
    ),
    Mistake(
        "the ramp between tiles is a pixel ahead: it starts at zero",
        LossyTiling,
        lambda _, tiles, overlap: join(tiles, overlap, blend=ahead),
        "join",
    ),
]
IN_TRAINING = [
    Mistake(
        "LPIPS has its dropout on: an instrument has none",
        Weighting,
        lambda m, x: m.model[1](F.dropout(x, training=True)),
    ),
    Mistake("the KL is summed over channels: over time and space", DiagonalGaussian, kl_over_channels, "kl"),
    Mistake("gradients go through the adaptive weight: it is a constant", losses, attached_weight, "adaptive_weight"),
    Mistake("the discriminator's loss reaches the VAE: detach what it judges", Trainer, undetached, "gan_loss"),
    Mistake("the moving average does not move", step, lambda *_: None, "move_average"),
    Mistake("biases and norms decay: only kernels do", Optimizer, decay_of_all, "__init__"),
    Mistake("gradients are not clipped", optimizer, lambda gradients, longest: gradients, "clipped"),
    Mistake(
        "gradients are cut value by value: their length all together is",
        optimizer,
        lambda gradients, longest: [gradient.clamp(-longest, longest) for gradient in gradients],
        "clipped",
    ),
]


@contextmanager
def made(mistake: Mistake):
    """Lets torch_ref make the mistake, everywhere, for a while."""
    with mock.patch.object(mistake.layer, mistake.method, mistake.forward):
        yield
