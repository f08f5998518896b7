"""The causal convolution. Shapes: B batch, C channels, T frames, H W pixels."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from torch_ref.layers.geometry import causal_padding, triple

Conv3d = nn.Conv3d

PAD_MODES = ("constant", "replicate", "reflect", "circular")


class CausalConv3d(nn.Module):
    """3D convolution whose frame t sees no frame after t, at any stride: B C T H W -> B C' T' H' W'.

    An int stride s means (s, 1, 1); an int kernel size or dilation counts for all three axes. A `pad_mode` other than
    constant gives way to constant, on all axes, where the clip is too short for it (time padding >= T).

    Raises ValueError for an even spatial kernel and for an unknown `pad_mode`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        pad_mode: str = "constant",
    ):
        super().__init__()
        kernel_size, dilation = triple(kernel_size), triple(dilation)
        stride = (stride, 1, 1) if isinstance(stride, int) else triple(stride)
        if kernel_size[1] % 2 == 0 or kernel_size[2] % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: height and width must be odd")
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode is {pad_mode!r}: choose one of {', '.join(PAD_MODES)}")
        self.pad_mode = pad_mode
        self.padding = causal_padding(kernel_size, dilation)
        self.conv = Conv3d(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.padding
        mode = "constant" if time[0] >= x.shape[2] else self.pad_mode
        # F.pad counts axes from the last one.
        return self.conv(F.pad(x, (*width, *height, *time), mode=mode))
