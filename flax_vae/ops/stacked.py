"""The stacked lowering: one 2D convolution of frames, with all frames that an output sees stacked as its channels.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O. cuDNN has faster kernels for 2D
than for 3D, and XLA gives it 2D alone with channels last, so that nothing is transposed. All sums of an output are
taken in one go: nothing is rounded between time taps. What it costs is to write each frame once for each tap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flax_vae.ops.geometry import Triple
from flax_vae.ops.window import Window, fold_frames, mirrored, pad_frames


def convolve(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves a clip."""
    seen, kernel = stack(x, kernel, window)
    y = _conv2d(fold_frames(seen), kernel, window)
    return y.reshape(*seen.shape[:2], *y.shape[1:])


def stack(x: Array, kernel: Array, window: Window) -> tuple[Array, Array]:
    """Returns (B, outputs, H, W, taps * C), the frames that each output sees, and the kernel (H, W, taps * I, O)."""
    taps, outputs = window.time_taps(len(kernel), x.shape[1]), window.output_size(x.shape[1:4], kernel.shape)
    seen = [pad_frames(x[:, tap.frames], tap.start, outputs[0]) for tap in taps]
    kernel = kernel[taps[0].index : taps[-1].index + 1]  # the taps that see frames are consecutive
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[4])
    return jnp.concatenate(seen, axis=-1), kernel


def input_gradient(dy: Array, kernel: Array, window: Window, size: Triple) -> Array:
    """Returns the gradient by a clip of this size: at stride 1, convolves with the mirrored kernel."""
    if max(window.stride) == 1:
        return convolve(dy, mirrored(kernel), window.mirrored(kernel.shape))
    x = jax.ShapeDtypeStruct((len(dy), *size, kernel.shape[3]), dy.dtype)
    return jax.linear_transpose(lambda x: convolve(x, kernel, window), x)(dy)[0]


def kernel_gradient(x: Array, dy: Array, window: Window, kernel: Triple) -> Array:
    """Returns the gradient by a kernel of this size, tap by tap: the frames that a tap sees are not copied."""
    weights = jax.ShapeDtypeStruct((*kernel[1:], x.shape[4], dy.shape[4]), dy.dtype)
    gradients = [jnp.zeros(weights.shape, weights.dtype)] * kernel[0]
    for tap in window.time_taps(kernel[0], x.shape[1]):
        seen = fold_frames(x[:, tap.frames])
        back = jax.linear_transpose(lambda weights, seen=seen: _conv2d(seen, weights, window), weights)
        gradients[tap.index] = back(fold_frames(dy[:, tap.start : tap.stop]))[0]
    return jnp.stack(gradients)


def _conv2d(x: Array, kernel: Array, window: Window) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.stride[1:],
        window.padding[1:],
        rhs_dilation=window.dilation[1:],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
