"""Self-attention within single frames. Shapes: B batch, C channels, T frames, H W pixels."""

import torch
from torch import Tensor, nn

from torch_ref.layers.norm import CausalGroupNorm


class Attention(nn.Module):
    """One head of C channels over the H*W pixels of each frame, added to its input: B C T H W, same shape.

    Scores and softmax are computed in float32, or in float64 where the input is float64.
    """

    def __init__(self, channels: int, num_groups: int = 32):
        super().__init__()
        self.group_norm = CausalGroupNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        pixels = self.group_norm(x).permute(0, 2, 3, 4, 1).reshape(batch * frames, height * width, channels)
        query, key, value = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)

        precise = torch.promote_types(x.dtype, torch.float32)
        scores = query.to(precise) @ key.to(precise).transpose(1, 2) * channels**-0.5
        weights = scores.softmax(dim=-1).to(value.dtype)

        out = self.to_out[0](weights @ value)
        return x + out.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
