"""Arithmetic of causal convolutions: sizes, padding and frame counts, in plain integers."""

from collections.abc import Sequence
from typing import Literal, get_args

FramePolicy = Literal["error", "pad", "trim"]  # what to do with frames that do not complete a latent
Pair = tuple[int, int]
Triple = tuple[int, int, int]
ENOUGH = 2048  # pixels that a step of a gradient by a kernel takes, where a clip has them


def triple(value: int | Sequence[int]) -> Triple:
    """Gives (time, height, width) from one integer, repeated, or from three; ValueError otherwise."""
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
    """Counts as `conv_output_size` does, and gives 0 where that raises."""
    return max(size + sum(padding) - dilation * (kernel - 1) - 1 + stride, 0) // stride


def causal_padding(kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1) -> tuple[Pair, Pair, Pair]:
    """Gives the (before, after) padding of time, height and width: all of time's in front, k // 2 around the rest."""
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


def latent_frames(frames: int, factor: int) -> int:
    """Counts the latent frames of a clip of factor * k + 1 frames; ValueError for any other number of frames.

    The first frame is a latent of its own, every later `factor` frames are one more.
    """
    if factor < 1:
        raise ValueError(f"a latent spans at least one frame, got a factor of {factor}")
    if frames < 1 or (frames - 1) % factor:
        below = max(1, frames - (frames - 1) % factor)
        near = f"{below}" if frames <= below else f"{below} or {below + factor}"
        raise ValueError(f"a clip must have {factor}k + 1 frames, got {frames}: use {near}")
    return (frames - 1) // factor + 1


def fitted_frames(frames: int, factor: int, policy: FramePolicy, start: bool = True) -> int:
    """Gives how many frames to make of the last `frames` of a stream so that whole latents come of them.

    At the start of a stream that is factor * k + 1, later factor * k. "error" raises ValueError for other numbers;
    "pad" rounds up, the last frame is to be repeated; "trim" rounds down, the last frames are to be left out.
    """
    if policy not in get_args(FramePolicy):
        raise ValueError(f"frames must be one of {', '.join(get_args(FramePolicy))}, got {policy!r}")
    over = (frames - start) % factor
    if policy == "error" and over:
        law, kind = (f"{factor}k + 1", "clip") if start else (f"{factor}k", "later chunk")
        raise ValueError(
            f"a {kind} must have {law} frames, got {frames}; frames='pad' repeats the last, 'trim' leaves {over} out"
        )
    return frames + (factor - over) % factor if policy == "pad" else frames - over


def pixel_frames(latents: int, factor: int) -> int:
    """Counts the frames that `latents` latent frames decode to; ValueError when there is no latent."""
    if latents < 1:
        raise ValueError(f"expected at least one latent frame, got {latents}")
    return factor * (latents - 1) + 1


def steps_of_frames(frames: int, pixels: int) -> tuple[int, int]:
    """Gives in how many steps to take frames of so many pixels, and how many of them in each, for `ENOUGH` pixels.

    The last step may have fewer: steps are as equal as they can be.
    """
    steps = -(-frames // -(-ENOUGH // pixels))
    return steps, -(-frames // steps)
