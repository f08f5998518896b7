"""I3D, with the names and the batch norms of the public checkpoint (Sonnet's). Clips are B C T H W."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pads time, height and width with zeros as TensorFlow's "SAME" does."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        missing = max((ceil(size / s) - 1) * s + k - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)


class Unit3D(nn.Module):
    """Convolution, batch norm without a scale, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.Conv_0 = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.BatchNorm_0 = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.Conv_0.kernel_size, self.Conv_0.stride)
        return torch.relu(self.BatchNorm_0(self.Conv_0(x)))


class MaxPool(nn.Module):
    """The largest of each window; what comes in is not negative, so zeros around it are never the largest."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int]):
        super().__init__()
        self.kernel, self.stride = tuple(kernel), tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class InceptionModule(nn.Module):
    """Four branches."""

    def __init__(self, channels: int, a: int, b: int, c: int, d: int, e: int, f: int):
        super().__init__()
        unit, pool = Unit3D, MaxPool((3, 3, 3), (1, 1, 1))
        self.Branch_0 = nn.Sequential()
        self.Branch_0.add_module("Conv3d_0a_1x1", unit(channels, a, 1))
        self.Branch_1, self.Branch_2 = nn.Sequential(), nn.Sequential()
        for branch, first, second in ((self.Branch_1, b, c), (self.Branch_2, d, e)):
            branch.add_module("Conv3d_0a_1x1", unit(channels, first, 1))
            branch.add_module("Conv3d_0b_3x3", unit(first, second, 3))
        self.Branch_3 = nn.Sequential()
        self.Branch_3.add_module("MaxPool3d_0a_3x3", pool)
        self.Branch_3.add_module("Conv3d_0b_1x1", unit(channels, f, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class I3D(nn.Module):
    """Logits of Kinetics-400, averaged over time. In evaluation mode from the start."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        for name, widths in WIDTHS.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, InceptionModule(*widths))
        self.Logits = nn.Sequential()
        self.Logits.add_module("Conv3d_0c_1x1", nn.Conv3d(1024, 400, 1))
        self.eval()

    def forward(self, video: Tensor) -> Tensor:
        """Returns B x 400 for B x 3 x T x 224 x 224, pixels in [-1, 1]."""
        *parts, logits = self.children()
        for part in parts:
            video = part(video)
        return logits(F.avg_pool3d(video, (2, 7, 7), stride=1)).squeeze((3, 4)).mean(dim=2)
