"""Rows of the layers, in every odd case; shapes are those of the input, B T H W C."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import torch

from flax_vae.models.posterior import DiagonalGaussian
from flax_vae.ops.geometry import lax_padding
from flax_vae.runtime.tile import LossyTiling, in_lossy_tiles
from parity.case import Case, Outputs, computed, function, layer
from torch_ref.models.posterior import DiagonalGaussian as TorchGaussian
from torch_ref.runtime.tile import LossyTiling as TorchTiling


def padding(numbers: tuple[int, ...]) -> Case:
    """A row for a padding tuple of torch, last axis of B C T H W first, on our axis order."""
    return function(
        f"pad-{len(numbers)}-numbers" + "-negative" * (min(numbers, default=0) < 0),
        (2, 3, 5, 4, 6),
        lambda x: jax.lax.pad(x, jnp.zeros((), x.dtype), lax_padding(numbers, 5, order=(0, 2, 3, 4, 1))),
        lambda x: torch.nn.functional.pad(x, numbers),
    )


def convolution(name: str, *args, shape=(2, 5, 7, 6, 6), **kwargs) -> Case:
    """A row for the plain convolution, 6 -> 10 channels."""
    return layer(f"conv-{name}", shape, "Conv3d", 6, 10, *args, **kwargs)


def causal(name: str, *args, shape=(2, 5, 7, 6, 6), **kwargs) -> Case:
    """A row for the causal convolution, 6 -> 10 channels."""
    return layer(f"causal-{name}", shape, "CausalConv3d", 6, 10, *args, **kwargs)


def posterior_outputs(posterior, sample) -> Outputs:
    """Names what both frameworks' posteriors give."""
    return {
        "mean": posterior.mode(),
        "logvar": posterior.logvar,
        "std": posterior.std,
        "sample": sample,
        "kl": posterior.kl(),
    }


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Draws what a sample of the posterior takes, B t h w z."""
    return np.random.default_rng(7).standard_normal(shape, np.float32)


def posterior_flax(moments) -> Outputs:
    posterior = DiagonalGaussian.from_moments(12 * moments)
    sample = posterior.at(jnp.asarray(noise(posterior.mean.shape)))
    return posterior_outputs(posterior, sample)


def posterior_torch(moments) -> Outputs:
    posterior = TorchGaussian(12 * moments)
    b, c, t, h, w = posterior.mean.shape
    sample = posterior.sample(torch.from_numpy(noise((b, t, h, w, c))).permute(0, 4, 1, 2, 3).to(moments))
    return posterior_outputs(posterior, sample)


def tiled(name: str, direction: str, height: int, width: int, tile: int = 8, overlap: int = 2, slow=True) -> Case:
    """A row for one resampler in lossy tiles of so many pixels, where a latent spans 2 pixels."""
    down = direction == "down"
    factor, ratio = (1, Fraction(1, 2)) if down else (2, Fraction(2))
    ours = LossyTiling(tile // factor, overlap // factor)
    torchs = TorchTiling(tile, overlap)
    return replace(
        layer(
            f"tiles-{direction}-{name}",
            (1, 2, height // factor, width // factor, 4),
            "SpatialDownsample" if down else "SpatialUpsample",
            4,
        ),
        call_flax=lambda layer, x: {"y": in_lossy_tiles(layer, ours, ratio)(x, None)[0]},
        call_torch=lambda layer, x: {"y": torchs.join(torchs.cut(x, factor, layer), overlap // 2 * factor)},
        slow=slow,
        slow_rounded=True,
    )


CASES = [
    layer("avgpool-2", (2, 4, 6, 8, 5), "AvgPool3d", 2),
    layer("avgpool-1x2x2-odd-size", (2, 3, 5, 7, 5), "AvgPool3d", (1, 2, 2)),
    layer("avgpool-3-stride-2-padding-1", (1, 5, 7, 6, 3), "AvgPool3d", 3, 2, 1),
    layer("avgpool-3-stride-2-padding-1-not-counted", (1, 5, 7, 6, 3), "AvgPool3d", 3, 2, 1, count_include_pad=False),
    layer("avgpool-3-stride-2-ceil", (2, 6, 6, 4, 3), "AvgPool3d", 3, 2, ceil_mode=True),
    layer("avgpool-3-stride-2-padding-1-ceil", (1, 6, 5, 8, 3), "AvgPool3d", 3, 2, 1, ceil_mode=True),
    layer("avgpool-ceil-no-window-in-padding", (1, 5, 5, 8, 3), "AvgPool3d", 2, 3, 1, ceil_mode=True),
    layer("avgpool-uneven-ceil", (1, 7, 6, 9, 3), "AvgPool3d", (2, 3, 4), (3, 1, 2), (1, 1, 2), True, False),
    padding(()),
    padding((1, 2)),
    padding((1, 2, 0, 3)),
    padding((1, 1, 2, 0, 2, 0)),
    padding((0, 1, 1, 2, 2, 0, 3, 1)),
    padding((0, 1, 1, 2, 2, 0, 3, 1, 1, 0)),
    padding((-1, 2, 1, -2, 3, -1)),
    convolution("3x3x3", 3),
    convolution("3x3x3-padding-1", 3, padding=1),
    convolution("1x1x1", 1),
    convolution("1x1x1-padding-1", 1, padding=1),
    convolution("3x3x3-stride-2", 3, 2),
    convolution("3x3x3-stride-2-padding-1", 3, 2, 1),
    convolution("3x3x3-stride-1x2x2-padding-1", 3, (1, 2, 2), 1),
    convolution("3x3x3-stride-2x1x1-padding-1", 3, (2, 1, 1), 1),
    convolution("1x1x1-stride-2", 1, 2),
    convolution("2x3x1-dilation-1x2x3", (2, 3, 1), dilation=(1, 2, 3), padding=(0, 2, 0)),
    causal("3x3x3", 3),
    causal("1x1x1", 1),
    causal("1x3x3", (1, 3, 3)),
    causal("3x1x1", (3, 1, 1)),
    causal("2x5x3", (2, 5, 3)),
    causal("stride-1x2x2", 3, (1, 2, 2)),
    causal("stride-2x1x1", 3, (2, 1, 1)),
    causal("stride-2", 3, 2),
    causal("stride-longer-than-kernel", (2, 3, 3), (3, 2, 1), shape=(2, 8, 6, 5, 6)),
    causal("dilation-2", 3, dilation=2, shape=(2, 7, 7, 9, 6)),
    causal("dilation-2-in-time-stride-2", 3, 2, dilation=(2, 1, 1), shape=(2, 7, 5, 6, 6)),
    causal("groups-2", 3, groups=2),
    causal("no-bias", 3, bias=False),
    causal("replicate", 3, pad_mode="replicate"),
    causal("reflect", 3, pad_mode="reflect"),
    causal("circular", 3, pad_mode="circular"),
    causal("reflect-5x5x5-stride-2", 5, (2, 2, 2), pad_mode="reflect", shape=(1, 6, 7, 9, 6)),
    causal("replicate-clip-too-short", 3, pad_mode="replicate", shape=(2, 2, 5, 6, 6)),
    causal("one-frame", 3, shape=(3, 1, 5, 4, 6)),
    causal("clip-shorter-than-kernel", (5, 3, 3), shape=(2, 2, 3, 4, 6)),
    causal("one-pixel", 3, shape=(1, 3, 1, 1, 6)),
    computed("per_frame", causal("3x3x3", 3)),
    computed("per_frame", layer("causal-3x3x3-110-channels", (2, 5, 9, 8, 6), "CausalConv3d", 6, 110, 3)),
    replace(
        computed("per_frame", causal("2x5x3-stride-2x3x2", (2, 5, 3), (2, 3, 2), shape=(2, 7, 8, 9, 6))),
        slow_rounded=True,
    ),
    replace(computed("per_frame", causal("stride-1x2x2", 3, (1, 2, 2))), slow=True),
    replace(computed("per_frame", causal("stride-2x1x1", 3, (2, 1, 1))), slow=True),
    computed("per_frame", causal("dilation-2", 3, dilation=2, shape=(2, 7, 7, 9, 6))),
    replace(computed("per_frame", causal("clip-shorter-than-kernel", (5, 3, 3), shape=(2, 2, 3, 4, 6))), slow=True),
    computed("stacked", causal("3x3x3", 3)),
    computed("stacked", causal("2x5x3-stride-2x3x2", (2, 5, 3), (2, 3, 2), shape=(2, 7, 8, 9, 6))),
    computed("stacked", causal("stride-1x2x2", 3, (1, 2, 2))),
    computed("stacked", causal("stride-2x1x1", 3, (2, 1, 1))),
    computed("stacked", causal("dilation-2", 3, dilation=2, shape=(2, 7, 7, 9, 6))),
    computed("stacked", causal("clip-shorter-than-kernel", (5, 3, 3), shape=(2, 2, 3, 4, 6))),
    computed("winograd", causal("3x3x3", 3)),
    replace(computed("winograd", causal("1x3x3", (1, 3, 3), shape=(3, 4, 9, 5, 6))), slow=True),
    replace(computed("winograd", causal("replicate", 3, pad_mode="replicate")), slow=True),
    replace(computed("winograd", layer("resnet", (2, 5, 7, 6, 32), "CausalResnetBlock", 32, 64)), slow=True),
    layer("causal-large", (1, 5, 24, 22, 24), "CausalConv3d", 24, 32, 3),
    replace(layer("causal-large-frames", (1, 3, 72, 66, 6), "CausalConv3d", 6, 10, 3), slow=True),
    layer("causal-3-channels-in", (2, 3, 9, 8, 3), "CausalConv3d", 3, 13, 3),
    layer("causal-3-channels-out", (2, 3, 9, 8, 13), "CausalConv3d", 13, 3, 3),
    layer("norm-4-groups", (3, 3, 5, 7, 12), "CausalGroupNorm", 4, 12),
    layer("norm-1-group", (1, 2, 3, 4, 5), "CausalGroupNorm", 1, 5),
    layer("norm-group-a-channel", (1, 2, 5, 3, 6), "CausalGroupNorm", 6, 6),
    layer("norm-eps-0.1", (1, 2, 5, 3, 6), "CausalGroupNorm", 2, 6, 0.1),
    layer("attention", (2, 3, 5, 4, 12), "Attention", 12, 4),
    replace(layer("attention-one-pixel", (1, 2, 1, 1, 12), "Attention", 12, 4), slow_rounded=True),
    layer("attention-wide", (1, 2, 6, 7, 20), "Attention", 20, 5),
    replace(layer("resnet", (2, 3, 5, 6, 8), "CausalResnetBlock", 8, None, 4), slow_rounded=True),
    layer("resnet-shortcut", (2, 3, 5, 6, 8), "CausalResnetBlock", 8, 12, 4),
    replace(
        layer("resnet-output-scale", (1, 4, 6, 5, 8), "CausalResnetBlock", 8, 12, 4, output_scale_factor=1.7),
        slow_rounded=True,
    ),
    replace(layer("resnet-one-frame", (3, 1, 4, 5, 8), "CausalResnetBlock", 8, 4, 2), slow_rounded=True),
    layer("spatial-down", (2, 3, 7, 6, 6), "SpatialDownsample", 6),
    layer("spatial-down-8-channels", (2, 3, 6, 5, 6), "SpatialDownsample", 6, 8),
    layer("spatial-down-pooled", (2, 3, 7, 6, 6), "SpatialDownsample", 6, use_conv=False),
    layer("temporal-down", (2, 5, 4, 5, 6), "TemporalDownsample", 6),
    layer("temporal-down-even-frames", (2, 4, 4, 5, 6), "TemporalDownsample", 6, 8),
    layer("temporal-down-pooled", (2, 5, 4, 5, 6), "TemporalDownsample", 6, use_conv=False),
    layer("temporal-down-pooled-one-frame", (2, 1, 4, 5, 6), "TemporalDownsample", 6, use_conv=False),
    layer("spatial-up", (2, 3, 4, 5, 6), "SpatialUpsample", 6),
    layer("spatial-up-5-channels", (2, 3, 3, 4, 6), "SpatialUpsample", 6, 5),
    layer("temporal-up", (2, 3, 4, 5, 6), "TemporalUpsample", 6),
    layer("temporal-up-one-frame-5-channels", (2, 1, 4, 5, 6), "TemporalUpsample", 6, 5),
    function("posterior", (2, 2, 4, 3, 12), posterior_flax, posterior_torch),
    tiled("last-merged", "up", 20, 26),
    tiled("last-as-long-as-stride", "up", 18, 14, slow=False),
    tiled("odd-size", "down", 17, 23, slow=False),
    tiled("odd-size-last-merged", "down", 13, 21),
    tiled("half-overlapping", "up", 16, 24, 8, 4),
    tiled("one-row", "up", 6, 22),
    tiled("one-column", "down", 22, 8),
    tiled("one", "down", 7, 8),
]  # fmt: skip
