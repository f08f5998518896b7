"""Discriminators. Clips are B C T H W; the logits are B 1 T' H' W'."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.layers.conv import CausalConv3d
from torch_ref.layers.norm import CausalGroupNorm

WIDTHS = (64, 128, 256, 512)


class PatchDiscriminator(nn.Module):
    """PatchGAN on single frames."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, len(widths)):
            stride = 2 if i < len(widths) - 1 else 1
            layers.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1))
            layers.append(nn.InstanceNorm2d(widths[i]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[0], x.shape[2]
        logits = self.main(x.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (batch, frames)).transpose(1, 2)


class CausalPatchDiscriminator(nn.Module):
    """PatchGAN on space and time, of causal convolutions."""

    def __init__(self, widths: Sequence[int] = WIDTHS, num_groups: int = 32):
        super().__init__()
        count = len(widths) - 1
        self.conv_in = CausalConv3d(3, widths[0], 3, (1, 2, 2))
        self.convs = nn.ModuleList(
            CausalConv3d(widths[i], widths[i + 1], 3, (1, 1, 1) if i == count - 1 else (2, 2, 2)) for i in range(count)
        )
        self.norms = nn.ModuleList(CausalGroupNorm(num_groups, width) for width in widths[1:])
        self.conv_out = CausalConv3d(widths[-1], 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)
