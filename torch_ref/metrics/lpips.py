"""LPIPS on VGG16. Clips are B C T H W; names are those of the lpips package's checkpoints."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)


class VGG16(nn.Module):
    """The features of torchvision's VGG16, in five slices, each of which ends in a ReLU."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        place, channels = 0, 3
        for i, (width, depth) in enumerate(zip(widths, DEPTHS, strict=True), 1):
            part = nn.Sequential()
            if i > 1:
                part.add_module(str(place), nn.MaxPool2d(2, 2))
                place += 1
            for _ in range(depth):
                part.add_module(str(place), nn.Conv2d(channels, width, 3, padding=1))
                part.add_module(str(place + 1), nn.ReLU())
                place, channels = place + 2, width
            self.add_module(f"slice{i}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            x = part(x)
            features.append(x)
        return features


class Weighting(nn.Module):
    """A weight for each channel, behind dropout, which an instrument has to leave off."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Perceptual distance of each frame: B T. In evaluation mode from the start."""

    def __init__(self, widths: Sequence[int] = WIDTHS):
        super().__init__()
        self.net = VGG16(widths)
        for i, width in enumerate(widths):
            self.add_module(f"lin{i}", Weighting(width))
        self.eval()

    def forward(self, video: Tensor, target: Tensor) -> Tensor:
        batch, _, frames = video.shape[:3]
        pairs = zip(self.features(video), self.features(target), strict=True)
        total = torch.zeros((), dtype=video.dtype, device=video.device)
        for i, (a, b) in enumerate(pairs):
            total = total + getattr(self, f"lin{i}")((a - b) ** 2).mean(dim=(1, 2, 3))
        return total.unflatten(0, (batch, frames))

    def features(self, x: Tensor) -> list[Tensor]:
        shift, scale = (x.new_tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        images = (x.transpose(1, 2).flatten(0, 1) - shift) / scale
        # not the root of a sum, whose gradient is not finite where all features are zero
        return [f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in self.net(images)]
