"""Group normalisation of single frames. Shapes: B batch, C channels, T frames, H W pixels."""

from torch import Tensor, nn


class CausalGroupNorm(nn.GroupNorm):
    """GroupNorm over (H, W, C / num_groups) of each frame by itself: B C T H W, same shape."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-6):
        super().__init__(num_groups, num_channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        batch, channels, frames, height, width = input.shape
        # Frames count as batch, so that no frame sees another.
        images = input.transpose(1, 2).reshape(batch * frames, channels, height, width)
        images = super().forward(images)
        return images.reshape(batch, frames, channels, height, width).transpose(1, 2)
