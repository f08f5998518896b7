"""The arithmetic of convolutions: output sizes and causal padding. Axes are listed as time, height, width."""

from collections.abc import Sequence

Pair = tuple[int, int]
Triple = tuple[int, int, int]


def triple(value: int | Sequence[int]) -> Triple:
    """One number for each of time, height and width: an int is repeated, three numbers are kept.

    Raises ValueError for any other count.
    """
    if isinstance(value, int):
        return (value, value, value)
    if len(value) != 3:
        raise ValueError(f"got {tuple(value)}: give one int, or three for (time, height, width)")
    time, height, width = value
    return (time, height, width)


def conv_output_size(size: int, kernel: int, stride: int = 1, padding: Pair = (0, 0), dilation: int = 1) -> int:
    """Length of one axis after a convolution: floor((size + before + behind - dilation*(kernel-1) - 1) / stride) + 1.

    Raises ValueError where the padded axis is shorter than the kernel's reach.
    """
    padded = size + sum(padding)
    reach = dilation * (kernel - 1) + 1
    if padded < reach:
        raise ValueError(f"padded size is {padded}, the kernel reaches over {reach}: pad more, or give more")
    return (padded - reach) // stride + 1


def causal_padding(kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1) -> tuple[Pair, Pair, Pair]:
    """What CausalConv3d pads, as (before, behind) for time, height and width.

    Time is padded in front only, by what the kernel reaches back; height and width by kernel // 2 on each side,
    whatever the dilation.
    """
    kernel_time, kernel_height, kernel_width = triple(kernel_size)
    dilation_time, _, _ = triple(dilation)
    return (
        (dilation_time * (kernel_time - 1), 0),
        (kernel_height // 2, kernel_height // 2),
        (kernel_width // 2, kernel_width // 2),
    )
