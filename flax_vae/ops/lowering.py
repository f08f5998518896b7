"""How a convolution is computed: by XLA's own, or, where that is slow, by 2D convolutions and matmuls.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O. A CPU computes by frames
(frames.py), an NVIDIA GPU one 2D convolution of stacked frames (stacked.py), and so does a TPU where an output sees but
one frame: it computes eight images at a time, and frames are images. docs/performance.md has the figures.

A convolution is linear in the clip and in the kernel. So are its two gradients, and theirs are these three functions
again: `convolve`, `input_gradient`, `kernel_gradient`. They can be differentiated any number of times, in reverse mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax import lax
from jaxtyping import Array

from flax_vae.ops import per_frame as frames
from flax_vae.ops import stacked
from flax_vae.ops.geometry import Triple
from flax_vae.ops.window import Window

SMALL = 10_000_000  # multiplications under which a program of another way would save less than compiling it costs


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves a clip; sums are taken in float32 or better."""
    ways = Ways(_plain, stacked.convolve, frames.convolve)
    return _computed(ways, x, kernel, (window,), x.shape[1:4], kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def input_gradient(dy: Array, kernel: Array, window: Window, size: Triple) -> Array:
    """Gives the gradient by a clip of this time, height and width, from that by what `convolve` makes of it."""
    ways = Ways(_plain_input_gradient, stacked.input_gradient, frames.input_gradient)
    return _computed(ways, dy, kernel, (window, size), size, kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def kernel_gradient(x: Array, dy: Array, window: Window, kernel: Triple) -> Array:
    """Gives the gradient by a kernel of this time, height and width, from that by what `convolve` makes with it."""
    ways = Ways(_plain_kernel_gradient, stacked.kernel_gradient, frames.kernel_gradient)
    return _computed(ways, x, dy, (window, kernel), x.shape[1:4], (*kernel, x.shape[4], dy.shape[4]))


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


class Ways(NamedTuple):
    """The same function of two arrays, a window, and perhaps more, computed in three ways."""

    plain: Callable
    stacked: Callable
    frames: Callable


@partial(jax.jit, static_argnums=(0, 3, 4, 5), inline=True)
def _computed(ways: Ways, left: Array, right: Array, rest: tuple, size: Triple, kernel: tuple[int, ...]) -> Array:
    """Computes by what the window, first of the rest, says, for a clip of this size and a kernel of this shape."""
    window = rest[0]
    plain, by_stacks, by_frames = (lambda left, right, way=way: way(left, right, *rest) for way in ways)
    outputs = window.output_size(size, kernel)
    if window.lowering == "plain" or window.groups > 1 or 0 in outputs or not window.time_taps(kernel[0], size[0]):
        return plain(left, right)
    if not frames.computes(window, kernel):
        by_frames = plain
    if window.lowering != "platform":
        return (by_stacks if window.lowering == "stacked" else by_frames)(left, right)
    if left.shape[0] * math.prod(outputs) * math.prod(kernel) < SMALL:
        return plain(left, right)
    of_platforms = {"cpu": by_frames, "cuda": by_stacks}
    if kernel[0] == 1 and max(kernel[1:3]) > 1:
        of_platforms["tpu"] = by_stacks
    return lax.platform_dependent(left, right, default=plain, **of_platforms)


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
