"""Arithmetic of causal convolutions: sizes and padding, in plain integers."""

from collections.abc import Sequence

Pair = tuple[int, int]
Triple = tuple[int, int, int]
MIN_PIXELS_PER_STEP = 2048  # of a kernel's gradient, where a clip has as many


def triple(value: int | Sequence[int]) -> Triple:
    """Returns (time, height, width) from one integer, repeated, or from three; ValueError otherwise."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(values) != 3 or not all(isinstance(size, int) for size in values):
        raise ValueError(f"expected one integer or three (time, height, width), got {value!r}")
    return values


def conv_output_size(size: int, kernel: int, stride: int = 1, padding: Pair = (0, 0), dilation: int = 1) -> int:
    """Counts the outputs of a convolution along one axis of `size` elements, padded by (before, after).

    Raises ValueError when the padded axis is shorter than the dilated kernel.
    """
    if not (count := conv_outputs(size, kernel, stride, padding, dilation)):
        raise ValueError(
            f"a kernel of {kernel} at dilation {dilation} spans {dilation * (kernel - 1) + 1} elements, "
            f"but {size} with padding {tuple(padding)} gives only {size + sum(padding)}: use a larger input"
        )
    return count


def conv_outputs(size: int, kernel: int, stride: int, padding: Pair, dilation: int) -> int:
    """Counts as `conv_output_size` does, and returns 0 where that raises."""
    return max(size + sum(padding) - dilation * (kernel - 1) - 1 + stride, 0) // stride


def causal_padding(kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1) -> tuple[Pair, Pair, Pair]:
    """Returns the (before, after) padding of time, height and width: all of time's in front, k // 2 around the rest."""
    kt, kh, kw = triple(kernel_size)
    return (triple(dilation)[0] * (kt - 1), 0), (kh // 2, kh // 2), (kw // 2, kw // 2)


def lax_padding(torch_pad: Sequence[int], rank: int, order: Sequence[int] | None = None) -> tuple[Triple, ...]:
    """Turns the tuple of torch's `F.pad`, last axis first, into a padding config for `jax.lax.pad`.

    Args:
      torch_pad: (before, after) of the last axis, then of the one before it, and so on; negative values crop.
      rank: number of axes of the array.
      order: for another axis order than torch's, the torch axis that each axis holds; (0, 2, 3, 4, 1) for B T H W C.

    Returns:
      One (before, after, interior) for every axis.

    Raises:
      ValueError: the tuple is odd in length or longer than the array has axes, or `order` is no permutation.
    """
    if len(torch_pad) % 2 or len(torch_pad) > 2 * rank:
        raise ValueError(
            f"expected (before, after) pairs for at most {rank} axes, got {len(torch_pad)} numbers: {tuple(torch_pad)}"
        )
    order = range(rank) if order is None else order
    if sorted(order) != list(range(rank)):
        raise ValueError(f"order must be a permutation of the {rank} axes, got {tuple(order)}")
    pairs = list(zip(torch_pad[::2], torch_pad[1::2], strict=True))[::-1]
    config = [(0, 0, 0)] * (rank - len(pairs)) + [(before, after, 0) for before, after in pairs]
    return tuple(config[axis] for axis in order)


def frame_steps(frames: int, pixels: int) -> tuple[int, int]:
    """Returns in how many steps to take frames of `pixels` pixels, and how many frames a step has.

    A step has at least `MIN_PIXELS_PER_STEP` pixels where the clip has them. Steps are as equal as they can be; the
    last one may have fewer frames.
    """
    steps = -(-frames // -(-MIN_PIXELS_PER_STEP // pixels))
    return steps, -(-frames // steps)
