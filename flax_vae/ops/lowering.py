"""The lowering of a convolution: XLA's own, or, where that is slow, 2D convolutions and matmuls.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O. A CPU computes frame by frame
(per_frame.py), an NVIDIA GPU one 2D convolution of stacked frames (stacked.py), and so does a TPU where an output sees
but one frame: it computes eight images at a time, and frames are images. docs/performance.md has the figures.

A convolution is linear in the clip and in the kernel. So are its two gradients, and the gradients of all three are
these three functions again: `convolve`, `input_gradient`, `kernel_gradient`. They can be differentiated any number of
times, in reverse mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flax_vae.ops import per_frame, stacked
from flax_vae.ops.geometry import Triple
from flax_vae.ops.precision import accumulation_dtype
from flax_vae.ops.window import Window

MIN_MULTIPLICATIONS = 10_000_000  # of a convolution; below, another lowering saves less time than compiling it costs
MAX_SPLIT_MULTIPLICATIONS = 2_000_000  # of a convolution; up to these, partial sums cost at most milliseconds
MAX_PARTS = 8  # partial sums of an output: each is a call of Eigen


class Backends(NamedTuple):
    """The same function of two arrays and a window, computed in four ways."""

    plain: Callable
    partial_sums: Callable
    stacked: Callable
    per_frame: Callable


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves a clip (B, T, H, W, I) with a kernel (T, H, W, I, O); sums are taken in float32 or better."""
    backends = Backends(_plain, _partial_sums, stacked.convolve, per_frame.convolve)
    return _lowered(backends, x, kernel, (window,), x.shape[1:4], kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def input_gradient(dy: Array, kernel: Array, window: Window, size: Triple) -> Array:
    """Returns the gradient by a clip of this time, height and width, given that by the output of `convolve`."""
    backends = Backends(
        _plain_input_gradient, _partial_sums_input_gradient, stacked.input_gradient, per_frame.input_gradient
    )
    return _lowered(backends, dy, kernel, (window, size), size, kernel.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def kernel_gradient(x: Array, dy: Array, window: Window, kernel: Triple) -> Array:
    """Returns the gradient by a kernel of this time, height and width, given that by the output of `convolve`."""
    backends = Backends(
        _plain_kernel_gradient, _plain_kernel_gradient, stacked.kernel_gradient, per_frame.kernel_gradient
    )
    return _lowered(backends, x, dy, (window, kernel), x.shape[1:4], (*kernel, x.shape[4], dy.shape[4]))


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


@partial(jax.jit, static_argnums=(0, 3, 4, 5), inline=True)
def _lowered(backends: Backends, left: Array, right: Array, rest: tuple, size: Triple, kernel: tuple[int, ...]):
    """Chooses the backend for a clip of this size and a kernel of this shape; the window is the first of the rest."""
    window = rest[0]
    plain, partial_sums, by_stack, by_frame = (
        lambda left, right, backend=backend: backend(left, right, *rest) for backend in backends
    )
    outputs = window.output_size(size, kernel)
    if window.lowering == "plain" or window.groups > 1 or 0 in outputs or not window.time_taps(kernel[0], size[0]):
        return plain(left, right)
    if not per_frame.supports(window, kernel):
        by_frame = plain
    if window.lowering != "platform":
        return (by_stack if window.lowering == "stacked" else by_frame)(left, right)
    multiplications = left.shape[0] * math.prod(outputs) * math.prod(kernel)
    if multiplications < MAX_SPLIT_MULTIPLICATIONS:
        return lax.platform_dependent(left, right, default=plain, cpu=partial_sums)
    if multiplications < MIN_MULTIPLICATIONS:
        return plain(left, right)
    platforms = {"cpu": by_frame, "cuda": by_stack}
    if kernel[0] == 1 and max(kernel[1:3]) > 1:
        platforms["tpu"] = by_stack
    return lax.platform_dependent(left, right, default=plain, **platforms)


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


def _partial_sums(x, kernel, window):
    """Convolves parts of the channels, each as a group, and adds these up: (T, H, W, I, O) is (T, H, W, I / n, n * O).

    Eigen adds all products of an output to one sum, which rounds about sqrt(n) times as much as sums of n sums do.
    """
    parts = _parts(x, kernel, x.shape[4])
    *size, channels, out = kernel.shape
    kernel = kernel.reshape(*size, parts, channels // parts, out)
    kernel = jnp.moveaxis(kernel, 3, 4).reshape(*size, channels // parts, parts * out)
    y = _plain(x, kernel, replace(window, groups=parts))
    return y.reshape(*y.shape[:4], parts, out).sum(axis=4)


def _partial_sums_input_gradient(dy, kernel, window, size):
    """Takes each part of the outputs for a group with inputs of its own, copies of the clip, and adds up theirs."""
    parts = _parts(dy, kernel, dy.shape[4])
    copies = _plain_input_gradient(dy, kernel, replace(window, groups=parts), size)
    return copies.reshape(*copies.shape[:4], parts, -1).sum(axis=4)


def _parts(x, kernel, channels):
    """Returns how many parts of the channels make partial sums as long as their number; 1 where these would round."""
    if x.dtype != accumulation_dtype(x):
        return 1
    most = min(MAX_PARTS, math.isqrt(math.prod(kernel.shape[:3]) * channels))
    return next(parts for parts in range(most, 0, -1) if channels % parts == 0)
