"""How a convolution is computed: by XLA's own, or, where that is slow, by 2D convolutions and matmuls of frames.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O. On a CPU, XLA's 3D convolutions
reach an eighth to a third of the matmul rate, and their gradients less; 2D ones reach most of it. So there each time
tap of a kernel is a 2D convolution of the frames that it sees, and nothing is computed of the zeros around a clip; or,
with channels and pixels enough, Winograd's products (winograd.py). docs/performance.md has the figures.

A convolution is linear in the clip and in the kernel. So are its two gradients, and theirs are these three functions
again: `convolve`, `input_gradient`, `kernel_gradient`. They can be differentiated any number of times, in reverse mode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import product
from operator import add
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from flax_vae.layers import winograd
from flax_vae.layers.geometry import Pair, Triple, conv_outputs, steps_of_frames

Lowering = Literal["platform", "plain", "frames", "winograd"]
SMALL = 10_000_000  # multiplications under which a program compiled by frames would save less than it costs
MOSTLY = 0.7  # of the products of frames and time taps, so many must be outputs' to compute all of them
FEW = 100  # output channels up to which one convolution for all time taps is faster than one for each
_lowering = jax.make_user_context("platform")  # which compiled programs are kept by


@contextlib.contextmanager
def lowered(way: Lowering) -> Iterator[None]:
    """Within it convolutions are traced to run in one way, where it can compute them, or as suits the platform.

    "plain" is XLA's own; what Winograd's products cannot compute runs by frames, and what these cannot, as XLA's own.
    """
    with _lowering(way):
        yield


def lowering() -> Lowering:
    """Tells how convolutions are computed where this is called."""
    return _lowering.value


@dataclass(frozen=True)
class Window:
    """What a convolution is beside its kernel: stride, padding and dilation of time, height and width, and groups."""

    stride: Triple
    padding: tuple[Pair, Pair, Pair]
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    lowering: Lowering = field(default_factory=lowering)

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Gives the output's time, height and width, 0 where the input is too small."""
        axes = zip(size, kernel[:3], self.stride, self.padding, self.dilation, strict=True)
        return tuple(conv_outputs(*axis) for axis in axes)

    def mirrored(self, kernel: Sequence[int]) -> Window:
        """Gives the window in which the mirrored kernel takes gradients of outputs to those of inputs, at stride 1."""
        reach = [(k - 1) * dilation for k, dilation in zip(kernel[:3], self.dilation, strict=True)]
        time, height, width = ((r - low, r - high) for r, (low, high) in zip(reach, self.padding, strict=True))
        return replace(self, padding=(time, height, width))


def wide_dtype(x: Array) -> np.dtype:
    """Gives the dtype in which sums over `x` are taken: float32 or better."""
    return np.promote_types(x.dtype, np.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves a clip; sums are taken in float32 or better."""
    return _computed(_plain, _by_frames, x, kernel, window, x.shape[1:4], kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def input_gradient(dy: Array, kernel: Array, window: Window, size: Triple) -> Array:
    """Gives the gradient by a clip of this time, height and width, from that by what `convolve` makes of it."""
    plain = partial(_plain_input_gradient, size=size)
    by_frames = partial(_input_gradient_by_frames, size=size)
    return _computed(plain, by_frames, dy, kernel, window, size, kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def kernel_gradient(x: Array, dy: Array, window: Window, kernel: Triple) -> Array:
    """Gives the gradient by a kernel of this time, height and width, from that by what `convolve` makes with it."""
    plain = partial(_plain_kernel_gradient, kernel=kernel)
    by_frames = partial(_kernel_gradient_by_frames, kernel=kernel)
    return _computed(plain, by_frames, x, dy, window, x.shape[1:4], (*kernel, x.shape[4], dy.shape[4]))


def _convolve_backward(window, inputs, dy):
    x, kernel = inputs
    dx = input_gradient(dy, kernel, window, x.shape[1:4])
    return dx, kernel_gradient(x, dy, window, kernel.shape[:3])


def _input_gradient_backward(window, size, inputs, dx):
    dy, kernel = inputs
    return convolve(dx, kernel, window), kernel_gradient(dx, dy, window, kernel.shape[:3])


def _kernel_gradient_backward(window, size, inputs, dkernel):
    x, dy = inputs
    return input_gradient(dy, dkernel, window, x.shape[1:4]), convolve(x, dkernel, window)


def _with_inputs(function):
    return lambda left, right, *static: (function(left, right, *static), (left, right))


convolve.defvjp(_with_inputs(convolve), _convolve_backward)
input_gradient.defvjp(_with_inputs(input_gradient), _input_gradient_backward)
kernel_gradient.defvjp(_with_inputs(kernel_gradient), _kernel_gradient_backward)


@partial(jax.jit, static_argnums=(0, 1, 4, 5, 6), inline=True)
def _computed(plain: Callable, by_frames: Callable, left: Array, right: Array, window: Window, size, kernel) -> Array:
    """Computes by what the window's lowering says, for a clip of this size and a kernel of this shape."""
    plain, by_frames = partial(plain, window=window), partial(by_frames, window=window)
    if window.lowering == "plain" or not _suits_frames(window, size, kernel):
        return plain(left, right)
    if window.lowering != "platform":
        return by_frames(left, right)
    work = left.shape[0] * math.prod(window.output_size(size, kernel)) * math.prod(kernel)
    return plain(left, right) if work < SMALL else lax.platform_dependent(left, right, cpu=by_frames, default=plain)


def _suits_frames(window: Window, size: Triple, kernel: tuple[int, ...]) -> bool:
    """Leaves to XLA what has groups, sees some pixels not at all or through holes, or sees nothing but zeros."""
    axes = zip(kernel[1:3], window.stride[1:], window.dilation[1:], strict=True)
    sees_all = all(stride == 1 or (dilation == 1 and stride <= k) for k, stride, dilation in axes)
    outputs = window.output_size(size, kernel)
    sees_any = 0 not in outputs and _time_taps(window, kernel[0], size[0], outputs[0])
    return window.groups == 1 and sees_all and bool(sees_any)


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
        and _share_seen(_time_taps(window, taps, x.shape[1], outputs[0]), taps, x.shape[1]) > MOSTLY
    )
    return pays or window.lowering == "winograd"


def _plain(x, kernel, window):
    return lax.conv_general_dilated(
        x,
        kernel,
        window.stride,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=window.groups,
    )


def _plain_input_gradient(dy, kernel, window, size):
    x = jax.ShapeDtypeStruct((dy.shape[0], *size, kernel.shape[3] * window.groups), dy.dtype)
    return jax.linear_transpose(lambda x: _plain(x, kernel, window), x)(dy)[0]


def _plain_kernel_gradient(x, dy, window, kernel):
    weights = jax.ShapeDtypeStruct((*kernel, x.shape[4] // window.groups, dy.shape[4]), dy.dtype)
    return jax.linear_transpose(lambda weights: _plain(x, weights, window), weights)(dy)[0]


class Tap(NamedTuple):
    """The outputs `start` to `stop` of which a time tap sees a frame, and the frame that the first of them sees."""

    index: int
    start: int
    stop: int
    frame: int


def _time_taps(window: Window, kernel: int, frames: int, outputs: int) -> list[Tap]:
    """Lists the time taps that see any frame, and of which outputs; the others see zeros alone."""
    stride, dilation, before = window.stride[0], window.dilation[0], window.padding[0][0]
    taps = []
    for index in range(kernel):
        ahead = index * dilation - before  # the tap of output i sees frame i * stride + ahead
        start, stop = max(0, -(ahead // stride)), min(outputs, (frames - 1 - ahead) // stride + 1)
        if start < stop:
            taps.append(Tap(index, start, stop, start * stride + ahead))
    return taps


def _by_frames(x, kernel, window):
    """Convolves by Winograd's products where these pay, else by the taps of time."""
    if not _suits_winograd(window, x, kernel.shape, tiles=1000):  # to pay for the sums of the kernel
        return _by_taps(x, kernel, window)
    before, after = window.padding[0]
    y = winograd.convolve(x, kernel, window.padding[1:], backwards=after > 0)
    return y if before or after else y[:, len(kernel) - 1 :]


def _by_taps(x, kernel, window):
    """Adds up 2D convolutions of the frames that each time tap sees, or those parts of one convolution for all taps.

    One convolution has the outputs of all taps as its channels; it is the faster one where a tap has few.
    """
    stride, (taps, out), frames = window.stride[0], (len(kernel), kernel.shape[4]), x.shape[1]
    outputs = window.output_size(x.shape[1:4], kernel.shape)[0]
    convolved = partial(_conv2d, padding=window.padding[1:], stride=window.stride[1:], dilation=window.dilation[1:])
    seen = _time_taps(window, taps, frames, outputs)
    at_once = out <= FEW and _share_seen(seen, taps, frames) > MOSTLY
    if at_once:
        every = _of_frames(partial(convolved, kernel=jnp.concatenate(list(kernel), axis=-1)), x)
    parts = []
    for tap in seen:
        last = tap.frame + (tap.stop - tap.start - 1) * stride
        frames_seen = slice(tap.frame, last + 1, stride)
        if at_once:
            part = every[:, frames_seen, ..., tap.index * out : (tap.index + 1) * out]
        else:
            part = _of_frames(partial(convolved, kernel=kernel[tap.index]), x[:, frames_seen])
        parts.append(_put(part, tap.start, outputs))
    return _total(parts, x)


def _share_seen(seen: list[Tap], taps: int, frames: int) -> float:
    """Gives how many of the products of each frame with each time tap are any output's."""
    return sum(tap.stop - tap.start for tap in seen) / (taps * frames)


def _input_gradient_by_frames(dy, kernel, window, size):
    """Convolves with the mirrored kernel; where there are strides, adds up what the frames of each tap get."""
    if max(window.stride) == 1:
        return _by_frames(dy, jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4), window.mirrored(kernel.shape))
    parts = []
    for tap in _time_taps(window, kernel.shape[0], size[0], dy.shape[1]):
        back = partial(_conv2d_input_gradient, kernel=kernel[tap.index], window=window, size=size[1:])
        part = _of_frames(back, dy[:, tap.start : tap.stop])
        parts.append(_put(part, tap.frame, size[0], window.stride[0]))
    return _total(parts, dy)


def _kernel_gradient_by_frames(x, dy, window, kernel):
    """Goes through the frames; what the kernel's rows see of each is multiplied with all outputs that see it.

    Frames are taken in as many turns as the time stride is: those of a turn are seen by the same taps.
    """
    if _suits_winograd(window, x, (*kernel, x.shape[4], dy.shape[4]), tiles=150) and not window.padding[0][1]:
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
                taps[k] = seen[:, :, :, index]
    return jnp.stack(taps)


def _kernel_gradient_of_turn(x, dy, window, kernel, ahead):
    """Gives (H, W, I, tap, O) of the taps through which frame i is seen by output i + ahead."""
    (outputs, height, width, out), first = dy.shape[1:], min(0, *ahead)
    steps, size = steps_of_frames(x.shape[1], len(x) * height * width)
    x = jnp.pad(x, ((0, 0), (0, steps * size - x.shape[1]), (0, 0), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (-first, max(0, steps * size + max(ahead) - outputs)), (0, 0), (0, 0), (0, 0)))
    rows, columns = (
        [slice(k * d, k * d + (n - 1) * s + 1, s) for k in range(taps)]
        for taps, d, n, s in zip(kernel[1:], window.dilation[1:], (height, width), window.stride[1:], strict=True)
    )

    def add_frames(sums, step):
        seen = lax.dynamic_slice_in_dim(x, step * size, size, 1)
        seen = jnp.concatenate([seen[:, :, :, column] for column in columns], axis=-1)
        pulls = [lax.dynamic_slice_in_dim(dy, step * size + n - first, size, 1) for n in ahead]
        pulls = jnp.concatenate(pulls, axis=-1).reshape(-1, len(ahead) * out)
        of_rows = [seen[:, :, row].reshape(len(pulls), -1).T for row in rows]
        return [
            s + jnp.matmul(row, pulls, preferred_element_type=s.dtype) for s, row in zip(sums, of_rows, strict=True)
        ], None

    nothing = jnp.zeros((kernel[2] * x.shape[4], len(ahead) * out), wide_dtype(dy))
    sums, _ = lax.scan(add_frames, [nothing] * kernel[1], jnp.arange(steps))
    return jnp.stack(sums).reshape(*kernel[1:], x.shape[4], len(ahead), out).astype(dy.dtype)


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
    y = function(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _put(part, start, frames, step=1):
    """Puts frames of zeros around and between those of `part`, which become `start`, `start + step`, ..."""
    after = frames - start - (part.shape[1] - 1) * step - 1
    return lax.pad(part, jnp.zeros((), part.dtype), ((0, 0, 0), (start, after, step - 1), *((0, 0, 0),) * 3))


def _total(parts, like):
    return reduce(add, parts).astype(like.dtype)
