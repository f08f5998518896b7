"""Convolutions by 2D convolutions and matmuls of frames, as suits a CPU.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O. On a CPU, XLA's 3D convolutions
reach an eighth to a third of the matmul rate, and their gradients less; 2D ones reach most of it. So here each time
tap of a kernel is a 2D convolution of the frames that it sees, and nothing is computed of the zeros around a clip; or,
with channels and pixels enough, Winograd's products (winograd.py). docs/performance.md has the figures.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from itertools import product
from operator import add
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from flax_vae.ops import schedule, stacked, winograd
from flax_vae.ops.geometry import Pair, Triple, conv_outputs, steps_of_frames
from flax_vae.ops.window import Tap, Window, images, mirrored, put, wide_dtype

MOSTLY = 0.7  # of the products of frames and time taps, so many must be outputs' to compute all of them
LARGE = 4096  # pixels, of which all that is computed stays in the cache: larger frames are taken one by one, or cut
FEW = 100  # channels up to which one convolution for all time taps is faster than one for each


def computes(window: Window, kernel: tuple[int, ...]) -> bool:
    """Tells whether this file computes a window of a kernel: none that sees some pixels not at all or through holes."""
    axes = zip(kernel[1:3], window.stride[1:], window.dilation[1:], strict=True)
    return all(stride == 1 or (dilation == 1 and stride <= k) for k, stride, dilation in axes)


def convolve(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves by Winograd's products where these pay, else by the taps of time."""
    if not _suits_winograd(window, x, kernel.shape, tiles=1000):  # to pay for the sums of the kernel
        return _by_taps(x, kernel, window)
    before, after = window.padding[0]
    y = winograd.convolve(x, kernel, window.padding[1:], backwards=after > 0)
    return y if before or after else y[:, len(kernel) - 1 :]


def _suits_winograd(window: Window, x: Array, kernel: tuple[int, ...], tiles: int) -> bool:
    """Tells whether Winograd's products compute this, and, where no lowering is asked for, whether they pay.

    For that a clip must have so many tiles of 2x2 outputs.
    """
    taps, outputs = kernel[0], window.output_size(x.shape[1:4], kernel)
    in_time = window.padding[0] in ((taps - 1, 0), (0, taps - 1), (0, 0))
    in_space = kernel[1:3] == (3, 3) and min(map(min, window.padding[1:])) >= 0
    is_wide = x.dtype == wide_dtype(x)  # in bfloat16 the sums of tiles would be rounded
    if (
        window.lowering == "frames"
        or not (is_wide and in_time and in_space)
        or {*window.stride, *window.dilation} != {1}
    ):
        return False
    of_frame = len(x) * -(-outputs[1] // 2) * -(-outputs[2] // 2)
    pays = (
        min(kernel[3:]) >= 64  # channels, for the matmuls
        and of_frame * math.prod(kernel[3:]) >= 4_000_000  # products in each of them
        and of_frame * x.shape[1] >= tiles
        and _share_seen(window.time_taps(taps, x.shape[1]), taps, x.shape[1]) > MOSTLY
    )
    return pays or window.lowering == "winograd"


def _by_taps(x, kernel, window):
    """Adds up 2D convolutions of the frames that each time tap sees, or those parts of one convolution for all taps.

    One convolution has the inputs of all taps as its channels, where these are few and no more than the outputs, or the
    outputs of all taps; it is the faster one where a tap has few.
    """
    (taps, out), frames = (len(kernel), kernel.shape[4]), x.shape[1]
    outputs = window.output_size(x.shape[1:4], kernel.shape)[0]
    convolved = partial(_conv2d, padding=window.padding[1:], stride=window.stride[1:], dilation=window.dilation[1:])
    if taps * x.shape[4] <= min(out, FEW):
        x, kernel = stacked.stack(x, kernel, window)
        return _of_frames(partial(convolved, kernel=kernel), x).astype(x.dtype)
    seen = window.time_taps(taps, frames)
    at_once = out <= FEW and _share_seen(seen, taps, frames) > MOSTLY
    if at_once:
        of_all_taps = partial(convolved, kernel=jnp.concatenate(list(kernel), axis=-1))
        if _is_large(x):
            return _frame_by_frame(x, of_all_taps, seen, outputs, out)
        every = _of_frames(of_all_taps, x)
    parts = []
    for tap in seen:
        if at_once:
            part = every[:, tap.frames, ..., tap.index * out : (tap.index + 1) * out]
        else:
            # strides make a part a sum of four, which would else wait for those of the other taps
            part = schedule.materialize_on_cpu(
                _of_frames(partial(convolved, kernel=kernel[tap.index]), x[:, tap.frames])
            )
        parts.append(put(part, tap.start, outputs))
    return _total(parts, x)


def _frame_by_frame(x, convolved, seen, outputs, out):
    """Adds what each frame gives all time taps to the outputs that see it, before the next frame is convolved."""
    sums = {}
    for frame in range(x.shape[1]):
        sums, image = lax.optimization_barrier((sums, x[:, frame]))
        every = convolved(image)
        for tap in seen:
            ahead, between = divmod(frame - tap.frame, tap.stride)
            output = tap.start + ahead
            if not between and tap.start <= output < tap.stop:
                part = every[..., tap.index * out : (tap.index + 1) * out]
                sums[output] = sums[output] + part if output in sums else part
    nothing = jnp.zeros_like(every[..., :out])
    return jnp.stack([sums.get(output, nothing) for output in range(outputs)], axis=1).astype(x.dtype)


def _is_large(x: Array) -> bool:
    """Tells whether the frames at one time have more pixels than stay in the cache."""
    return len(x) * math.prod(x.shape[2:4]) > LARGE


def _share_seen(seen: list[Tap], taps: int, frames: int) -> float:
    """Gives how many of the products of each frame with each time tap are any output's."""
    return sum(tap.stop - tap.start for tap in seen) / (taps * frames)


def input_gradient(dy: Array, kernel: Array, window: Window, size: Triple) -> Array:
    """Convolves with the mirrored kernel; where there are strides, adds up what the frames of each tap get."""
    if max(window.stride) == 1:
        return convolve(dy, mirrored(kernel), window.mirrored(kernel.shape))
    parts = []
    for tap in window.time_taps(len(kernel), size[0]):
        back = partial(_conv2d_input_gradient, kernel=kernel[tap.index], window=window, size=size[1:])
        part = _of_frames(back, dy[:, tap.start : tap.stop])
        parts.append(put(part, tap.frame, size[0], window.stride[0]))
    return _total(parts, dy)


def kernel_gradient(x: Array, dy: Array, window: Window, kernel: Triple) -> Array:
    """Goes through the frames; what the kernel's rows see of each is multiplied with all outputs that see it.

    Frames are taken in as many turns as the time stride is: those of a turn are seen by the same taps. Winograd's
    products compute those that are not large, where they pay.
    """
    suits_winograd = _suits_winograd(window, x, (*kernel, x.shape[4], dy.shape[4]), tiles=150)
    is_left_to_blocks = window.lowering == "platform" and _is_large(dy)
    if suits_winograd and not window.padding[0][1] and not is_left_to_blocks:
        dy = jnp.pad(dy, ((0, 0), (x.shape[1] - dy.shape[1], 0), (0, 0), (0, 0), (0, 0)))
        return winograd.kernel_gradient(x, dy, window.padding[1:], kernel[0])
    stride, taps = window.stride[0], [jnp.zeros((*kernel[1:], x.shape[4], dy.shape[4]), dy.dtype)] * kernel[0]
    x = jnp.pad(x, ((0, 0), (0, 0), *window.padding[1:], (0, 0)))
    for turn in range(min(stride, x.shape[1])):
        behind = {k: turn + window.padding[0][0] - k * window.dilation[0] for k in range(kernel[0])}
        outputs = {k: value // stride for k, value in behind.items() if value % stride == 0}
        if outputs:
            seen = _kernel_gradient_of_turn(x[:, turn::stride], dy, window, kernel, list(outputs.values()))
            for index, k in enumerate(outputs):
                taps[k] = seen[index]
    return jnp.stack(taps)


def _kernel_gradient_of_turn(x, dy, window, kernel, ahead):
    """Gives (tap, H, W, I, O) of the taps through which frame i is seen by output i + ahead.

    Large frames are taken in blocks of rows. Outputs have their channels first: XLA multiplies a matrix of many columns
    with one of many rows at 1.5 times the rate of two of many rows.
    """
    (outputs, height, width, out), first = dy.shape[1:], min(0, *ahead)
    steps, size = steps_of_frames(x.shape[1], len(x) * height * width)
    block = -(-height // max(1, len(x) * height * width // LARGE))
    blocks = -(-height // block)
    more, stride = blocks * block - height, window.stride[1]
    x = jnp.pad(x, ((0, 0), (0, steps * size - x.shape[1]), (0, more * stride), (0, 0), (0, 0)))
    later = max(0, steps * size + max(ahead) - outputs)
    dy = jnp.pad(dy, ((0, 0), (-first, later), (0, more), (0, 0), (0, 0)))
    dy = jnp.moveaxis(dy, (1, 4), (0, 1))  # T O B H W
    rows, columns = (
        [slice(k * d, k * d + (n - 1) * s + 1, s) for k in range(taps)]
        for taps, d, n, s in zip(kernel[1:], window.dilation[1:], (block, width), window.stride[1:], strict=True)
    )

    def add_block(sums, index):
        frame, top = index // blocks * size, index % blocks * block
        seen = lax.dynamic_slice(x, (0, frame, top * stride, 0, 0), (len(x), size, rows[-1].stop, *x.shape[3:]))
        seen = jnp.moveaxis(seen, 1, 0)
        seen = jnp.concatenate([seen[:, :, :, column] for column in columns], axis=-1)
        of_block = (size, *dy.shape[1:3], block, width)
        pulls = [lax.dynamic_slice(dy, (frame + n - first, 0, 0, top, 0), of_block) for n in ahead]
        pulls = [jnp.moveaxis(pull, 1, 0) for pull in pulls]
        pulls = jnp.stack(pulls).reshape(len(ahead) * out, -1)
        of_rows = [seen[:, :, row].reshape(pulls.shape[1], -1) for row in rows]
        return [
            s + jnp.matmul(pulls, row, preferred_element_type=s.dtype) for s, row in zip(sums, of_rows, strict=True)
        ], None

    nothing = jnp.zeros((len(ahead) * out, kernel[2] * x.shape[4]), wide_dtype(dy))
    sums, _ = lax.scan(add_block, [nothing] * kernel[1], jnp.arange(steps * blocks))
    sums = jnp.stack(sums).reshape(kernel[1], len(ahead), out, kernel[2], x.shape[4])
    return jnp.transpose(sums, (1, 0, 3, 4, 2)).astype(dy.dtype)


def _conv2d_input_gradient(dy, kernel, window, size):
    """Gives each of stride x stride kinds of pixel by a convolution with the taps that see it, and interleaves them."""
    kernel, stride = jnp.swapaxes(kernel, 2, 3), window.stride[1:]
    of_axes = [
        [
            _phase(window, axis, kernel.shape[axis], size[axis], dy.shape[axis + 1], start)
            for start in range(stride[axis])
        ]
        for axis in (0, 1)
    ]
    kinds = [
        _conv2d(dy, kernel[row.taps][:, column.taps], (row.padding, column.padding), (1, 1), window.dilation[1:])
        for row, column in product(*of_axes)
    ]
    if len(kinds) == 1:
        return kinds[0]
    kinds = jnp.stack(kinds, axis=3).reshape(*kinds[0].shape[:3], *stride, kinds[0].shape[3])
    kinds = jnp.moveaxis(kinds, 3, 2)  # B, H / stride, stride, W / stride, stride, C
    return kinds.reshape(len(dy), kinds.shape[1] * stride[0], -1, kinds.shape[5])[:, : size[0], : size[1]]


class Phase(NamedTuple):
    """Taps, as indices from the last to the first, that see every stride-th pixel, and the padding of the outputs."""

    taps: np.ndarray
    padding: Pair


def _phase(window: Window, axis: int, kernel: int, size: int, outputs: int, start: int) -> Phase:
    """Gives the taps that see the pixels start, start + stride, ... of height (axis 0) or width (1)."""
    stride, before = window.stride[1 + axis], window.padding[1 + axis][0]
    dilation = window.dilation[1 + axis]
    behind = {k: start + before - k * dilation for k in reversed(range(kernel))}
    ahead = {k: value // stride for k, value in behind.items() if value % stride == 0}
    count = -(-size // stride)
    padding = -min(ahead.values()), count + max(ahead.values()) - outputs
    return Phase(np.array(list(ahead)), padding)


def _conv2d(x, kernel, padding, stride, dilation):
    """Convolves images (B, H, W, C); with strides as a sum over the kinds of pixel that each part of the kernel sees.

    XLA's CPU backend gives 2D convolutions to YNNPACK, but to Eigen where the output is larger than the input, and
    Eigen is up to twice as fast in float32. So a row or two too much are computed, where that is little.
    """
    if max(stride) > 1:
        return _conv2d_strided(x, kernel, padding, stride, dilation)
    (above, below), columns = padding
    rows = conv_outputs(x.shape[1], kernel.shape[0], 1, (above, below), dilation[0])
    more = max(0, x.shape[1] + 1 - rows) if x.dtype == jnp.float32 else 0
    y = lax.conv_general_dilated(
        x,
        kernel,
        stride,
        ((above, below + (more if more <= rows // 8 else 0)), columns),
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=wide_dtype(x),
    )
    return y[:, :rows]


def _conv2d_strided(x, kernel, padding, stride, dilation):
    """Adds up convolutions of every stride-th row and column, from each row and column of the kernel on."""
    axes = zip(x.shape[1:3], kernel.shape[:2], stride, padding, dilation, strict=True)
    outputs = [conv_outputs(*axis) for axis in axes]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    parts = []
    for row, column in product(*map(range, stride)):
        part = kernel[row :: stride[0], column :: stride[1]]
        height, width = (n + (k - 1) * d for n, k, d in zip(outputs, part.shape[:2], dilation, strict=True))
        seen = x[:, row :: stride[0], column :: stride[1]][:, :height, :width]
        parts.append(_conv2d(seen, part, ((0, 0), (0, 0)), (1, 1), dilation))
    return reduce(add, parts)


def _of_frames(function, x):
    """Maps (B T) H W C by a function, and gives B T H W C."""
    y = function(images(x))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _total(parts, like):
    """Adds up, once: XLA else computes the sum within each of what needs it, and keeps all parts."""
    return schedule.materialize_on_cpu(reduce(add, parts).astype(like.dtype))
