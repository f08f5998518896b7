"""The per-frame lowering, for CPUs: 2D convolutions and matmuls of frames.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O. On a CPU, XLA's 3D convolutions
reach an eighth to a third of the matmul rate, and their gradients less; 2D ones reach most of it. So each time tap of a
kernel is a 2D convolution of the frames that it sees, and padding in time costs nothing; with enough channels and
pixels, Winograd's products take over (winograd.py). docs/performance.md has the figures.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from itertools import product
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from flax_vae.ops import schedule, stacked, winograd
from flax_vae.ops.geometry import Pair, Triple, conv_outputs, frame_steps
from flax_vae.ops.precision import accumulation_dtype
from flax_vae.ops.window import Tap, Window, fold_frames, mirrored, pad_frames

MIN_USED_SHARE = 0.7  # computing all taps at once pays only if this share of the frame x tap products reaches an output
CACHE_PIXELS = 4096  # whose sums and products stay in the cache: larger frames are taken one by one, or in blocks
MAX_FUSED_CHANNELS = 100  # up to which one convolution for all time taps is faster than one for each


def supports(window: Window, kernel: tuple[int, ...]) -> bool:
    """Supported: spatial stride at most the kernel size, and no stride together with dilation."""
    axes = zip(kernel[1:3], window.stride[1:], window.dilation[1:], strict=True)
    return all(stride == 1 or (dilation == 1 and stride <= k) for k, stride, dilation in axes)


def convolve(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves by Winograd's products where these pay, otherwise tap by tap."""
    if not _suits_winograd(window, x, kernel.shape, min_tiles=1000):  # to pay for the sums of the kernel
        return _by_taps(x, kernel, window)
    before, after = window.padding[0]
    y = winograd.convolve(x, kernel, window.padding[1:], backwards=after > 0)
    return y if before or after else y[:, len(kernel) - 1 :]


def _suits_winograd(window: Window, x: Array, kernel: tuple[int, ...], min_tiles: int) -> bool:
    """Whether Winograd's products support this, and, where no lowering is asked for, whether they pay.

    They pay from `min_tiles` tiles of 2x2 outputs in a clip on.
    """
    taps, outputs = kernel[0], window.output_size(x.shape[1:4], kernel)
    in_time = window.padding[0] in ((taps - 1, 0), (0, taps - 1), (0, 0))
    in_space = kernel[1:3] == (3, 3) and min(map(min, window.padding[1:])) >= 0
    is_wide = x.dtype == accumulation_dtype(x)  # in bfloat16 the sums of tiles would be rounded
    if (
        window.lowering == "per_frame"
        or not (is_wide and in_time and in_space)
        or {*window.stride, *window.dilation} != {1}
    ):
        return False
    of_frame = len(x) * -(-outputs[1] // 2) * -(-outputs[2] // 2)
    pays = (
        min(kernel[3:]) >= 64  # channels, for the matmuls
        and of_frame * math.prod(kernel[3:]) >= 4_000_000  # products in each of them
        and of_frame * x.shape[1] >= min_tiles
        and _used_share(window.time_taps(taps, x.shape[1]), taps, x.shape[1]) > MIN_USED_SHARE
    )
    return pays or window.lowering == "winograd"


def _by_taps(x, kernel, window):
    """Adds up a 2D convolution for each time tap, of the frames that it sees, or slices of one for all taps.

    One convolution for all taps is faster where a tap has few channels: with the inputs of all taps as its input
    channels, or with the outputs of all taps as its output channels.
    """
    (taps, out), frames = (len(kernel), kernel.shape[4]), x.shape[1]
    outputs = window.output_size(x.shape[1:4], kernel.shape)[0]
    convolved = partial(_conv2d, padding=window.padding[1:], stride=window.stride[1:], dilation=window.dilation[1:])
    if taps * x.shape[4] <= min(out, MAX_FUSED_CHANNELS):
        x, kernel = stacked.stack(x, kernel, window)
        return _of_frames(partial(convolved, kernel=kernel), x).astype(x.dtype)
    seen = window.time_taps(taps, frames)
    is_fused = out <= MAX_FUSED_CHANNELS and _used_share(seen, taps, frames) > MIN_USED_SHARE
    if is_fused:
        of_all_taps = partial(convolved, kernel=jnp.concatenate(list(kernel), axis=-1))
        if _leaves_cache(x):
            return _frame_by_frame(x, of_all_taps, seen, outputs, out)
        every = _of_frames(of_all_taps, x)
    parts = []
    for tap in seen:
        if is_fused:
            part = every[:, tap.frames, ..., tap.index * out : (tap.index + 1) * out]
        else:
            # with strides a part is a sum of four, which would otherwise wait for those of the other taps
            part = schedule.materialize_on_cpu(
                _of_frames(partial(convolved, kernel=kernel[tap.index]), x[:, tap.frames])
            )
        parts.append(pad_frames(part, tap.start, outputs))
    return _total(parts, x)


def _frame_by_frame(x, convolved, seen, outputs, out):
    """Convolves one frame for all time taps and adds it to the outputs that see it, before the next frame.

    `every` is (B, H, W, taps * O) of one frame; of the whole clip it would leave the cache.
    """
    sums = {}
    for frame in range(x.shape[1]):
        sums, image = lax.optimization_barrier((sums, x[:, frame]))  # the next frame waits for these sums
        every = convolved(image)
        for tap in seen:
            ahead, between = divmod(frame - tap.frame, tap.stride)
            output = tap.start + ahead
            if not between and tap.start <= output < tap.stop:
                part = every[..., tap.index * out : (tap.index + 1) * out]
                sums[output] = sums[output] + part if output in sums else part
    nothing = jnp.zeros_like(every[..., :out])
    return jnp.stack([sums.get(output, nothing) for output in range(outputs)], axis=1).astype(x.dtype)


def _leaves_cache(x: Array) -> bool:
    """Whether the frames at one time have more pixels than stay in the cache."""
    return len(x) * math.prod(x.shape[2:4]) > CACHE_PIXELS


def _used_share(seen: list[Tap], taps: int, frames: int) -> float:
    """Returns the share of the products of each frame with each time tap that reach an output."""
    return sum(tap.stop - tap.start for tap in seen) / (taps * frames)


def input_gradient(dy: Array, kernel: Array, window: Window, size: Triple) -> Array:
    """Convolves with the mirrored kernel; with strides, adds up the gradients of the frames that each tap sees."""
    if max(window.stride) == 1:
        return convolve(dy, mirrored(kernel), window.mirrored(kernel.shape))
    parts = []
    for tap in window.time_taps(len(kernel), size[0]):
        back = partial(_conv2d_input_gradient, kernel=kernel[tap.index], window=window, size=size[1:])
        part = _of_frames(back, dy[:, tap.start : tap.stop])
        parts.append(pad_frames(part, tap.frame, size[0], window.stride[0]))
    return _total(parts, dy)


def kernel_gradient(x: Array, dy: Array, window: Window, kernel: Triple) -> Array:
    """Multiplies what the kernel's rows see of each frame with all outputs that see the frame.

    Every stride-th frame, from each of the first on, is seen by the same time taps: they are computed together.
    Winograd's products compute frames that stay in the cache, where they pay.
    """
    suits_winograd = _suits_winograd(window, x, (*kernel, x.shape[4], dy.shape[4]), min_tiles=150)
    is_left_to_blocks = window.lowering == "platform" and _leaves_cache(dy)
    if suits_winograd and not window.padding[0][1] and not is_left_to_blocks:
        dy = jnp.pad(dy, ((0, 0), (x.shape[1] - dy.shape[1], 0), (0, 0), (0, 0), (0, 0)))
        return winograd.kernel_gradient(x, dy, window.padding[1:], kernel[0])
    stride, taps = window.stride[0], [jnp.zeros((*kernel[1:], x.shape[4], dy.shape[4]), dy.dtype)] * kernel[0]
    x = jnp.pad(x, ((0, 0), (0, 0), *window.padding[1:], (0, 0)))
    for first in range(min(stride, x.shape[1])):
        # output o sees frame f through tap k where o * stride = f + before - k * dilation
        behind = {k: first + window.padding[0][0] - k * window.dilation[0] for k in range(kernel[0])}
        outputs = {k: value // stride for k, value in behind.items() if value % stride == 0}
        if outputs:
            seen = _kernel_gradient_of_taps(x[:, first::stride], dy, window, kernel, list(outputs.values()))
            for index, k in enumerate(outputs):
                taps[k] = seen[index]
    return jnp.stack(taps)


def _kernel_gradient_of_taps(x, dy, window, kernel, ahead):
    """Returns (taps, H, W, I, O) of the time taps through which frame i is seen by output i + ahead[tap].

    One matmul for each row of the kernel, over all pixels of a block: (taps * O, pixels) by (pixels, W * I). Frames
    that leave the cache are taken in blocks of rows. The cotangents have their channels first: XLA multiplies a matrix
    of many columns with one of many rows at 1.5 times the rate of two of many rows.
    """
    (outputs, height, width, out), first = dy.shape[1:], min(0, *ahead)
    steps, size = frame_steps(x.shape[1], len(x) * height * width)
    block = -(-height // max(1, len(x) * height * width // CACHE_PIXELS))  # rows
    blocks = -(-height // block)
    more, stride = blocks * block - height, window.stride[1]
    # pad both to whole steps and blocks, and the cotangent so far that i + ahead is never outside
    x = jnp.pad(x, ((0, 0), (0, steps * size - x.shape[1]), (0, more * stride), (0, 0), (0, 0)))
    dtype = accumulation_dtype(dy)
    later = max(0, steps * size + max(ahead) - outputs)
    dy = jnp.pad(dy, ((0, 0), (-first, later), (0, more), (0, 0), (0, 0)))
    dy = jnp.moveaxis(dy, (1, 4), (0, 1))  # T O B H W
    rows, columns = (
        [slice(k * d, k * d + (n - 1) * s + 1, s) for k in range(taps)]
        for taps, d, n, s in zip(kernel[1:], window.dilation[1:], (block, width), window.stride[1:], strict=True)
    )

    def add_block(sums, index):
        frame, top = index // blocks * size, index % blocks * block
        # all columns of the kernel side by side: (frames, B, rows, width, W * I); its rows are slices of this
        seen = lax.dynamic_slice(x, (0, frame, top * stride, 0, 0), (len(x), size, rows[-1].stop, *x.shape[3:]))
        seen = jnp.moveaxis(seen, 1, 0)
        seen = jnp.concatenate([seen[:, :, :, column] for column in columns], axis=-1)
        of_block = (size, *dy.shape[1:3], block, width)
        cotangents = [lax.dynamic_slice(dy, (frame + n - first, 0, 0, top, 0), of_block) for n in ahead]
        cotangents = jnp.stack([jnp.moveaxis(part, 1, 0) for part in cotangents]).reshape(len(ahead) * out, -1)
        products = [
            jnp.matmul(cotangents, seen[:, :, row].reshape(cotangents.shape[1], -1), preferred_element_type=dtype)
            for row in rows
        ]
        return jax.tree.map(add, sums, products), None

    nothing = jnp.zeros((len(ahead) * out, kernel[2] * x.shape[4]), dtype)
    sums, _ = lax.scan(add_block, [nothing] * kernel[1], jnp.arange(steps * blocks))
    sums = jnp.stack(sums).reshape(kernel[1], len(ahead), out, kernel[2], x.shape[4])
    return jnp.transpose(sums, (1, 0, 3, 4, 2)).astype(dy.dtype)


def _conv2d_input_gradient(dy, kernel, window, size):
    """Convolves for each of the stride x stride phases of a pixel with the taps that see it, and interleaves them.

    A transposed convolution without its zeros: input pixels whose row and column leave the same remainder modulo the
    stride see the same taps of the kernel, so that each phase is a plain convolution of dy, (B, H / s, W / s, I).
    """
    kernel, stride = jnp.swapaxes(kernel, 2, 3), window.stride[1:]
    of_axes = [
        [
            _phase(window, axis, kernel.shape[axis], size[axis], dy.shape[axis + 1], start)
            for start in range(stride[axis])
        ]
        for axis in (0, 1)
    ]
    phases = [
        _conv2d(dy, kernel[row.taps][:, column.taps], (row.padding, column.padding), (1, 1), window.dilation[1:])
        for row, column in product(*of_axes)
    ]
    if len(phases) == 1:
        return phases[0]
    pixels = jnp.stack(phases, axis=3).reshape(*phases[0].shape[:3], *stride, phases[0].shape[3])
    pixels = jnp.moveaxis(pixels, 3, 2)  # B, H / s, s, W / s, s, C
    return pixels.reshape(len(dy), pixels.shape[1] * stride[0], -1, pixels.shape[5])[:, : size[0], : size[1]]


class Phase(NamedTuple):
    """Taps, as indices from the last to the first, that see every stride-th pixel, and the padding of the outputs."""

    taps: np.ndarray
    padding: Pair


def _phase(window: Window, axis: int, kernel: int, size: int, outputs: int, start: int) -> Phase:
    """Returns the taps that see the pixels start, start + stride, ... of height (axis 0) or width (1)."""
    stride, before = window.stride[1 + axis], window.padding[1 + axis][0]
    dilation = window.dilation[1 + axis]
    behind = {k: start + before - k * dilation for k in reversed(range(kernel))}
    ahead = {k: value // stride for k, value in behind.items() if value % stride == 0}
    count = -(-size // stride)
    padding = -min(ahead.values()), count + max(ahead.values()) - outputs
    return Phase(np.array(list(ahead)), padding)


def _conv2d(x, kernel, padding, stride, dilation):
    """Convolves images (B, H, W, C); with strides as a sum over the phases of the kernel.

    XLA's CPU backend gives 2D convolutions to YNNPACK, but to Eigen where the output is larger than the input, and
    Eigen is up to twice as fast in float32. So a row or two more are computed than needed, where they are few.
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
        preferred_element_type=accumulation_dtype(x),
    )
    return y[:, :rows]


def _conv2d_strided(x, kernel, padding, stride, dilation):
    """Adds up convolutions of every stride-th row and column with every stride-th row and column of the kernel."""
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
    """Applies a function of images (B T) H W C to B T H W C."""
    y = function(fold_frames(x))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _total(parts, like):
    """Adds up and materialises: otherwise XLA recomputes the sum in every consumer, and keeps all parts."""
    return schedule.materialize_on_cpu(reduce(add, parts).astype(like.dtype))
