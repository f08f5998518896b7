"""The table of everything that is compared: one row a layer, in every odd case.

A row builds the same thing in both frameworks; shapes are those of the input, B T H W C.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_vae
import torch_ref
from flax_vae.metrics import lpips
from flax_vae.models.config import narrow
from flax_vae.ops.window import Lowering, lowered
from flax_vae.runtime.tile import LossyTiles, LossyTiling, in_lossy_tiles
from flax_vae.train import discriminator, losses
from torch_ref.metrics import lpips as torch_lpips
from torch_ref.train import discriminator as torch_discriminator
from torch_ref.train import losses as torch_losses

LAYER_TOLERANCE, MODEL_TOLERANCE = 1e-12, 1e-10
Outputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row: how to build both sides, what to call, and how far float64 results may be apart (relative)."""

    name: str
    shape: tuple[int, int, int, int, int]
    build_flax: Callable[[], Any]
    build_torch: Callable[[], Any]
    call_flax: Callable[[Any, jax.Array], Outputs]
    call_torch: Callable[[Any, torch.Tensor], Outputs]
    tolerance: float = LAYER_TOLERANCE
    slow: bool = False
    large: bool = False  # takes several GiB
    gradients: bool = True
    draws: int = 3


def layer(name: str, shape: tuple, class_name: str, *args, **kwargs) -> Case:
    """A row for a layer class that both packages have under one name, with one signature."""
    with_rngs = class_name != "AvgPool3d"  # it has no parameters
    return Case(
        name,
        shape,
        build_flax=lambda: getattr(flax_vae, class_name)(
            *args, **kwargs, **({"rngs": nnx.Rngs(0)} if with_rngs else {})
        ),
        build_torch=lambda: getattr(torch_ref, class_name)(*args, **kwargs),
        call_flax=lambda module, x: {"y": only_output(module(x))},
        call_torch=lambda module, x: {"y": module(x)},
    )


def only_output(result):
    """Drops the carry of layers that return one."""
    return result[0] if isinstance(result, tuple) else result


def function(name: str, shape: tuple, call_flax: Callable, call_torch: Callable) -> Case:
    """A row for functions, which have no parameters; `call_*` map an array to an output, or outputs by name."""

    def named(call):
        return lambda _, x: result if isinstance(result := call(x), dict) else {"y": result}

    return Case(
        name,
        shape,
        build_flax=lambda: None,
        build_torch=lambda: None,
        call_flax=named(call_flax),
        call_torch=named(call_torch),
    )


def padding(numbers: tuple[int, ...]) -> Case:
    """A row for a padding tuple of torch, last axis of B C T H W first, on our axis order."""
    return function(
        f"pad-{len(numbers)}-numbers" + "-negative" * (min(numbers, default=0) < 0),
        (2, 3, 5, 4, 6),
        lambda x: jax.lax.pad(x, jnp.zeros((), x.dtype), flax_vae.lax_padding(numbers, 5, order=(0, 2, 3, 4, 1))),
        lambda x: torch.nn.functional.pad(x, numbers),
    )


def convolution(name: str, *args, shape=(2, 5, 7, 6, 6), **kwargs) -> Case:
    """A row for the plain convolution, 6 -> 10 channels."""
    return layer(f"conv-{name}", shape, "Conv3d", 6, 10, *args, **kwargs)


def causal(name: str, *args, shape=(2, 5, 7, 6, 6), **kwargs) -> Case:
    """A row for the causal convolution, 6 -> 10 channels."""
    return layer(f"causal-{name}", shape, "CausalConv3d", 6, 10, *args, **kwargs)


def computed(by: Lowering, row: Case) -> Case:
    """The same row with its convolutions computed in a way that a platform or a size may choose."""

    def call(module, x):
        with lowered(by):
            return row.call_flax(module, x)

    return replace(row, name=f"{row.name}-by-{by}", call_flax=call)


def posterior_outputs(posterior, sample) -> Outputs:
    """Names what both frameworks' posteriors give."""
    return {
        "mean": posterior.mode(),
        "logvar": posterior.logvar,
        "std": posterior.std,
        "sample": sample,
        "kl": posterior.kl(),
    }


def posterior_flax(moments) -> Outputs:
    posterior = flax_vae.DiagonalGaussian.from_moments(12 * moments)
    sample = posterior.sample(jax.random.key(7))
    return posterior_outputs(posterior, sample)


def posterior_torch(moments) -> Outputs:
    posterior = torch_ref.DiagonalGaussian(12 * moments)
    b, c, t, h, w = posterior.mean.shape
    noise = torch.from_numpy(np.array(jax.random.normal(jax.random.key(7), (b, t, h, w, c), jnp.float32)))
    sample = posterior.sample(noise.permute(0, 4, 1, 2, 3).to(moments))
    return posterior_outputs(posterior, sample)


def scaling(variant: str, method: str) -> Case:
    """A row for the latent statistics of a released variant, in one direction."""
    return function(
        f"scaling-{variant}-{method}",
        (2, 3, 4, 5, 16),
        getattr(flax_vae.LatentScaling.released(variant), method),
        getattr(torch_ref.LatentScaling.released(variant), method),
    )


def part(name: str, class_name: str, config: flax_vae.VAEConfig, shape: tuple, **kwargs) -> Case:
    """A row for the encoder or the decoder of a config."""
    return replace(
        layer(name, shape, class_name, None),
        build_flax=lambda: getattr(flax_vae, class_name)(config, rngs=nnx.Rngs(0)),
        build_torch=lambda: getattr(torch_ref, class_name)(torch_ref.VAEConfig.from_dict(config.to_dict())),
        tolerance=MODEL_TOLERANCE,
        **kwargs,
    )


def whole(name: str, config: flax_vae.VAEConfig, shape: tuple, chunk: int | None = None, **kwargs) -> Case:
    """A row for the whole VAE: the posterior of a clip, and the clip decoded from its mode.

    With `chunk`, flax_vae encodes so many frames at a time and decodes as many latents as come of them.
    """
    frames, latents = ({}, {}) if chunk is None else ({"chunk": chunk}, {"chunk": chunk // config.temporal_factor})

    def call(vae, x, encode=frames, decode=latents):
        posterior = vae.encode(x, **encode)
        return {"mean": posterior.mean, "logvar": posterior.logvar, "video": vae.decode(posterior.mode(), **decode)}

    return Case(
        name,
        shape,
        build_flax=lambda: flax_vae.CausalVideoVAE(config, rngs=nnx.Rngs(0)),
        build_torch=lambda: torch_ref.CausalVideoVAE.from_config(config.to_dict()),
        call_flax=call,
        call_torch=lambda vae, x: call(vae, x, {}, {}),
        tolerance=MODEL_TOLERANCE,
        **kwargs,
    )


def tiled(name: str, direction: str, height: int, width: int, tile: int = 8, overlap: int = 2) -> Case:
    """A row for one resampler in lossy tiles of so many pixels, where a latent spans 2 pixels."""
    down = direction == "down"
    factor, ratio = (1, Fraction(1, 2)) if down else (2, Fraction(2))
    ours = LossyTiling(tile // factor, overlap // factor)
    torchs = torch_ref.LossyTiling(tile, overlap)
    return replace(
        layer(
            f"tiles-{direction}-{name}",
            (1, 2, height // factor, width // factor, 4),
            "SpatialDownsample" if down else "SpatialUpsample",
            4,
        ),
        call_flax=lambda layer, x: {"y": in_lossy_tiles(layer, ours, ratio)(x, None)[0]},
        call_torch=lambda layer, x: {"y": torchs.join(torchs.cut(x, factor, layer), overlap // 2 * factor)},
    )


def tiled_whole(name: str, config: flax_vae.VAEConfig, shape: tuple, tile: int, overlap: int, **kwargs) -> Case:
    """A row for the whole VAE in lossy tiles."""
    row, torchs = whole(name, config, shape, **kwargs), torch_ref.LossyTiling(tile, overlap)

    def call_torch(vae, x):
        posterior = torchs.encode(vae, x)
        return {"mean": posterior.mean, "logvar": posterior.logvar, "video": torchs.decode(vae, posterior.mode())}

    return replace(
        row,
        call_flax=lambda vae, x: row.call_flax(LossyTiles(vae, LossyTiling(tile, overlap)), x),
        call_torch=call_torch,
    )


def loss(name: str, *more, parts: int = 2) -> Case:
    """A row for a loss that both packages have under one name, of as many clips as the batch is cut into."""
    return function(
        name.replace("_", "-"),
        (4, 3, 5, 4, 3),
        lambda x: getattr(losses, name)(*jnp.split(x, parts), *more),
        lambda x: getattr(torch_losses, name)(*x.chunk(parts), *more),
    )


def adaptive(name: str, size: float) -> Case:
    """A row for a GAN's loss times its adaptive weight, a constant to gradients, by a reconstruction of that size."""

    def call_flax(x):
        kernel, a, b = jnp.split(x, 3)
        terms = lambda kernel: size * losses.mse(kernel, a), lambda kernel: losses.mse(jnp.sin(kernel), b)
        weight = losses.adaptive_weight(*(jax.grad(term)(kernel) for term in terms))
        return weight * terms[1](kernel)

    def call_torch(x):
        kernel, a, b = x.chunk(3)
        gan = torch_losses.mse(torch.sin(kernel), b)
        return torch_losses.adaptive_weight(size * torch_losses.mse(kernel, a), gan, kernel) * gan

    return function(name, (3, 3, 5, 4, 3), call_flax, call_torch)


class TorchLPIPS(torch.nn.Module):
    """LPIPS of torch_ref, with the names and shapes that the parameters of flax_vae's have."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        original = torch_lpips.LPIPS(widths)
        self.convs = torch.nn.ModuleList(m for m in original.net.modules() if isinstance(m, torch.nn.Conv2d))
        self.lins = torch.nn.ModuleList(torch.nn.Linear(width, 1, bias=False) for width in widths)
        self._original = (original,)  # in a tuple, where its own parameters are not found

    def forward(self, video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = {
            f"lin{i}.model.1.weight": lin.get_parameter("weight")[..., None, None] for i, lin in enumerate(self.lins)
        }
        return torch.func.functional_call(self._original[0], weights, (video, target))


def perceptual(name: str, shape: tuple, chunk: int | None = None, **kwargs) -> Case:
    """A row for LPIPS of two clips, the halves of the batch, in pixels so large that they outlive its many layers."""
    return Case(
        name,
        shape,
        build_flax=lambda: lpips.LPIPS(LPIPS_WIDTHS, rngs=nnx.Rngs(0)),
        build_torch=lambda: TorchLPIPS(LPIPS_WIDTHS),
        call_flax=lambda module, x: {"distance": module(*jnp.split(50 * x, 2), chunk)},
        call_torch=lambda module, x: {"distance": module(*(50 * x).chunk(2))},
        tolerance=MODEL_TOLERANCE,
        draws=8,
        **kwargs,
    )


def judge(name: str, shape: tuple, class_name: str, *args) -> Case:
    """A row for a discriminator."""
    return replace(
        layer(name, shape, class_name),
        build_flax=lambda: getattr(discriminator, class_name)(*args, rngs=nnx.Rngs(0)),
        build_torch=lambda: getattr(torch_discriminator, class_name)(*args),
    )


def judging(row: Case, name: str) -> Case:
    """A row for what a discriminator minimises, of two clips, the halves of the batch."""

    def outputs(module, losses, real, fake):
        return {"hinge": losses.hinge_discriminator(module(real), module(fake)), "r1": losses.r1(module, real)}

    return replace(
        row,
        name=name,
        call_flax=lambda module, x: outputs(module, losses, *jnp.split(x, 2)),
        call_torch=lambda module, x: outputs(module, torch_losses, *x.chunk(2)),
        draws=8,
    )


LPIPS_WIDTHS = (8, 8, 8, 8, 8)
FRAMES_JUDGE = judge("discriminator-frames", (2, 2, 26, 32, 3), "PatchDiscriminator", (4, 6, 8))
CAUSAL_JUDGE = judge("discriminator-causal", (2, 5, 12, 17, 3), "CausalPatchDiscriminator", (4, 6, 8), 2)


# The first and the second width of every down block of the released model, and of every up block, as multiples.
DOWN_STEPS, UP_STEPS = ((1, 1), (1, 2), (2, 4), (4, 4)), ((4, 4), (4, 4), (4, 2), (2, 1))


def block(kind: str, index: int, steps: tuple, shape: tuple, width: int = 8) -> Case:
    """A row for one of the released model's down or up blocks, with two residual blocks and both resamplers."""
    before, after = (width * times for times in steps[index])
    name, temporal = f"{kind}-block-{index}", {f"temporal_{kind}sample": True}
    return layer(name, (*shape, before), f"{kind.title()}Block", before, after, 2, 4, **temporal)


NARROW = narrow((8, 16, 24, 16), groups=4, encoder_layers=1, decoder_layers=2)
SHALLOW = flax_vae.VAEConfig(
    encoder_out_channels=3, decoder_in_channels=3, encoder_norm_num_groups=3, decoder_norm_num_groups=5,
    encoder_block_out_channels=(6, 9), decoder_block_out_channels=(5, 15),
    encoder_layers_per_block=(1, 2), decoder_layers_per_block=(2, 1),
    encoder_down_block_types=("DownEncoderBlockCausal3D",) * 2, decoder_up_block_types=("UpDecoderBlockCausal3D",) * 2,
    encoder_spatial_down_sample=(True, False), decoder_spatial_up_sample=(False, True),
    encoder_temporal_down_sample=(False, True), decoder_temporal_up_sample=(False, True),
    encoder_block_dropout=(0.0,) * 2, decoder_block_dropout=(0.0,) * 2,
)  # fmt: skip
FULL = flax_vae.VAEConfig.full()
SINGLE = flax_vae.VAEConfig(
    encoder_out_channels=3, decoder_in_channels=3, encoder_norm_num_groups=2, decoder_norm_num_groups=2,
    encoder_block_out_channels=(6,), decoder_block_out_channels=(4,),
    encoder_layers_per_block=(1,), decoder_layers_per_block=(1,),
    encoder_down_block_types=("DownEncoderBlockCausal3D",), decoder_up_block_types=("UpDecoderBlockCausal3D",),
    encoder_spatial_down_sample=(True,), decoder_spatial_up_sample=(True,),
    encoder_temporal_down_sample=(True,), decoder_temporal_up_sample=(True,),
    encoder_block_dropout=(0.0,), decoder_block_dropout=(0.0,),
)  # fmt: skip
UNEVEN = flax_vae.VAEConfig(
    encoder_out_channels=5, decoder_in_channels=5, encoder_norm_num_groups=4, decoder_norm_num_groups=3,
    encoder_block_out_channels=(8, 12, 20), decoder_block_out_channels=(6, 9, 12, 18),
    encoder_layers_per_block=(2, 1, 1), decoder_layers_per_block=(1, 2, 1, 1),
    encoder_down_block_types=("DownEncoderBlockCausal3D",) * 3, decoder_up_block_types=("UpDecoderBlockCausal3D",) * 4,
    encoder_spatial_down_sample=(True, False, True), decoder_spatial_up_sample=(False, True, False, True),
    encoder_temporal_down_sample=(False, True, False), decoder_temporal_up_sample=(False, False, True, False),
    encoder_block_dropout=(0.0,) * 3, decoder_block_dropout=(0.0,) * 4,
)  # fmt: skip


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
    computed("frames", causal("3x3x3", 3)),
    computed("frames", layer("causal-3x3x3-110-channels", (2, 5, 9, 8, 6), "CausalConv3d", 6, 110, 3)),
    computed("frames", causal("2x5x3-stride-2x3x2", (2, 5, 3), (2, 3, 2), shape=(2, 7, 8, 9, 6))),
    computed("frames", causal("stride-1x2x2", 3, (1, 2, 2))),
    computed("frames", causal("stride-2x1x1", 3, (2, 1, 1))),
    computed("frames", causal("dilation-2", 3, dilation=2, shape=(2, 7, 7, 9, 6))),
    computed("frames", causal("clip-shorter-than-kernel", (5, 3, 3), shape=(2, 2, 3, 4, 6))),
    computed("stacked", causal("3x3x3", 3)),
    computed("stacked", causal("2x5x3-stride-2x3x2", (2, 5, 3), (2, 3, 2), shape=(2, 7, 8, 9, 6))),
    computed("stacked", causal("stride-1x2x2", 3, (1, 2, 2))),
    computed("stacked", causal("stride-2x1x1", 3, (2, 1, 1))),
    computed("stacked", causal("dilation-2", 3, dilation=2, shape=(2, 7, 7, 9, 6))),
    computed("stacked", causal("clip-shorter-than-kernel", (5, 3, 3), shape=(2, 2, 3, 4, 6))),
    computed("winograd", causal("3x3x3", 3)),
    computed("winograd", causal("1x3x3", (1, 3, 3), shape=(3, 4, 9, 5, 6))),
    computed("winograd", causal("replicate", 3, pad_mode="replicate")),
    replace(computed("winograd", layer("resnet", (2, 5, 7, 6, 32), "CausalResnetBlock", 32, 64)), slow=True),
    layer("causal-large", (1, 5, 24, 22, 24), "CausalConv3d", 24, 32, 3),
    layer("causal-large-frames", (1, 3, 72, 66, 6), "CausalConv3d", 6, 10, 3),
    layer("causal-3-channels-in", (2, 3, 9, 8, 3), "CausalConv3d", 3, 13, 3),
    layer("causal-3-channels-out", (2, 3, 9, 8, 13), "CausalConv3d", 13, 3, 3),
    layer("norm-4-groups", (3, 3, 5, 7, 12), "CausalGroupNorm", 4, 12),
    layer("norm-1-group", (1, 2, 3, 4, 5), "CausalGroupNorm", 1, 5),
    layer("norm-group-a-channel", (1, 2, 5, 3, 6), "CausalGroupNorm", 6, 6),
    layer("norm-eps-0.1", (1, 2, 5, 3, 6), "CausalGroupNorm", 2, 6, 0.1),
    layer("attention", (2, 3, 5, 4, 12), "Attention", 12, 4),
    layer("attention-one-pixel", (1, 2, 1, 1, 12), "Attention", 12, 4),
    layer("attention-wide", (1, 2, 6, 7, 20), "Attention", 20, 5),
    layer("resnet", (2, 3, 5, 6, 8), "CausalResnetBlock", 8, None, 4),
    layer("resnet-shortcut", (2, 3, 5, 6, 8), "CausalResnetBlock", 8, 12, 4),
    layer("resnet-output-scale", (1, 4, 6, 5, 8), "CausalResnetBlock", 8, 12, 4, output_scale_factor=1.7),
    layer("resnet-one-frame", (3, 1, 4, 5, 8), "CausalResnetBlock", 8, 4, 2),
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
    *(block("down", index, DOWN_STEPS, (1, 5, 6, 5)) for index in range(4)),
    layer("down-block-plain", (1, 3, 4, 5, 8), "DownBlock", 8, 12, 1, 4, spatial_downsample=False),
    layer("mid-block", (2, 3, 4, 5, 32), "MidBlock", 32, 8),
    *(block("up", index, UP_STEPS, (1, 2, 4, 3)) for index in range(4)),
    layer("up-block-plain", (1, 3, 4, 5, 8), "UpBlock", 8, 12, 1, 4, spatial_upsample=False),
    part("encoder", "Encoder", NARROW, (1, 9, 9, 16, 3), slow=True),
    part("decoder", "Decoder", NARROW, (1, 2, 3, 2, 16), slow=True),
    function("posterior", (2, 2, 4, 3, 12), posterior_flax, posterior_torch),
    loss("l1"),
    loss("mse"),
    loss("hinge_discriminator"),
    loss("hinge_generator", parts=1),
    loss("lecam", 0.3, -0.2),
    adaptive("adaptive-weight", 10.0),
    adaptive("adaptive-weight-at-most-10000", 1e5),
    perceptual("lpips", (2, 2, 17, 20, 3), slow=True),
    perceptual("lpips-chunks", (2, 3, 16, 16, 3), chunk=2, slow=True),
    FRAMES_JUDGE,
    CAUSAL_JUDGE,
    judge("discriminator-causal-one-frame", (2, 1, 12, 16, 3), "CausalPatchDiscriminator", (4, 6, 8), 2),
    judging(FRAMES_JUDGE, "discriminator-frames-losses"),
    replace(judging(CAUSAL_JUDGE, "discriminator-causal-losses"), slow=True),
    *(scaling(variant, method) for variant in ("flux", "sd3") for method in ("normalize", "denormalize")),
    whole("vae-narrow", NARROW, (1, 9, 16, 8, 3)),
    whole("vae-shallow", SHALLOW, (2, 5, 7, 6, 3), slow=True),
    whole("vae-uneven", UNEVEN, (1, 5, 9, 11, 3), slow=True),
    whole("vae-remat", replace(SINGLE, remat=True), (2, 3, 5, 4, 3), slow=True),
    whole("vae-chunks", SINGLE, (2, 5, 5, 4, 3), chunk=2, slow=True),
    whole("vae-frame-by-frame", replace(SINGLE, frame_by_frame=True), (2, 5, 5, 4, 3), slow=True),
    tiled("last-merged", "up", 20, 26),
    tiled("last-as-long-as-stride", "up", 18, 14),
    tiled("odd-size", "down", 17, 23),
    tiled("odd-size-last-merged", "down", 13, 21),
    tiled("half-overlapping", "up", 16, 24, 8, 4),
    tiled("one-row", "up", 6, 22),
    tiled("one-column", "down", 22, 8),
    tiled("one", "down", 7, 8),
    tiled_whole("vae-tiles", SINGLE, (1, 3, 17, 23, 3), 8, 2, gradients=False, slow=True),
    whole("vae-full-335M", FULL, (1, 9, 16, 24, 3), slow=True, large=True, gradients=False, draws=1),
]  # fmt: skip
