"""LPIPS on VGG16. Clips are B C T H W; names are those of the lpips package's checkpoints."""

import torch
from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The features of torchvision's VGG16, in five slices, each of which ends in a ReLU."""

    def __init__(self):
        super().__init__()
        place, channels = 0, 3
        for i, widths in enumerate(STAGES, 1):
            part = nn.Sequential()
            if i > 1:
                part.add_module(str(place), nn.MaxPool2d(2, 2))
                place += 1
            for width in widths:
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
    """Perceptual distance of each frame: B T."""

    def __init__(self):
        super().__init__()
        self.net = VGG16()
        for i, widths in enumerate(STAGES):
            self.add_module(f"lin{i}", Weighting(widths[-1]))

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
        return [f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in self.net(images)]
