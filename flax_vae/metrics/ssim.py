"""SSIM, the structural similarity of frames: B batch, T frames, H W pixels, C channels."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_vae.layers.conv import Clip
from flax_vae.ops.precision import accumulation_dtype

RADIUS, SIGMA = 5, 1.5  # of the window: pixels
WINDOW = 2 * RADIUS + 1
STABLE_MEAN, STABLE_VARIANCE = 0.01**2, 0.03**2  # of pixels from 0 to 1


def ssim(video: Clip, target: Clip) -> Float[Array, "b t"]:
    """Returns the structural similarity (Wang et al. 2004) of each frame of (B, T, H, W, C) to that of the target.

    Pixels are in [-1, 1], H and W at least 11. Windows are Gaussian, 11 x 11 with a sigma of 1.5; the mean is taken
    over all windows that lie within the frame, and over channels: the number that scikit-image returns for
    `structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)`.
    """
    if video.shape != target.shape or min(video.shape[2:4]) < WINDOW:
        raise ValueError(
            f"expected two clips of one shape (B, T, H, W, C) of at least {WINDOW}x{WINDOW} pixels, "
            f"got {video.shape} and {target.shape}"
        )
    frames = tuple((x.reshape(-1, *x.shape[2:]).astype(accumulation_dtype(x)) + 1) / 2 for x in (video, target))
    return jax.lax.map(lambda pair: _ssim_of_frame(*pair), frames).reshape(video.shape[:2])


def _ssim_of_frame(a, b):
    middle = b.mean()  # subtracted first, so that small variances do not drown in the rounding of large squares
    a, b = a - middle, b - middle
    mean_a, mean_b, aa, bb, ab = _blurred(jnp.stack([a, b, a * a, b * b, a * b]))
    variances, covariance = aa - mean_a**2 + bb - mean_b**2, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + middle, mean_b + middle
    luminance = (2 * mean_a * mean_b + STABLE_MEAN) / (mean_a**2 + mean_b**2 + STABLE_MEAN)
    structure = (2 * covariance + STABLE_VARIANCE) / (variances + STABLE_VARIANCE)
    return (luminance * structure).mean()


def _blurred(x):
    """Averages the windows of (..., H, W, C) by slices: accelerators compute convolutions in less than float32."""
    weights = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-RADIUS, RADIUS + 1)]
    for axis in (x.ndim - 3, x.ndim - 2):
        size = x.shape[axis] - 2 * RADIUS
        parts = [jax.lax.slice_in_dim(x, i, i + size, axis=axis) * w for i, w in enumerate(weights)]
        x = sum(parts[1:], parts[0]) / sum(weights)
    return x
