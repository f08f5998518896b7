"""Rows of the Pyramid-Flow family: blocks, encoder, decoder, whole models; shapes are those of the input, B T H W C."""

from dataclasses import replace

from flax import nnx

import torch_ref
from flax_vae.families.pyramid import CausalVideoVAE, CausalVideoVAEConfig, narrow
from flax_vae.layers.sequence import Execution
from flax_vae.runtime.tile import LossyTiles, LossyTiling
from parity.case import MANY_DRAWS, MODEL_TOLERANCE, Case, function, layer, named
from torch_ref.families.pyramid import RELEASED_SCALINGS

PLAIN = Execution()


def scaling(variant: str, method: str) -> Case:
    """A row for the latent statistics of a released variant, in one direction."""
    return function(
        f"scaling-{variant}-{method}",
        (2, 3, 4, 5, 16),
        getattr(CausalVideoVAE.released_scalings[variant], method),
        getattr(RELEASED_SCALINGS[variant], method),
    )


def part(name: str, class_name: str, config: CausalVideoVAEConfig, shape: tuple, **kwargs) -> Case:
    """A row for the encoder or the decoder of a config."""
    return replace(
        layer(name, shape, class_name, None),
        build_flax=lambda: named("flax_vae", class_name)(config, rngs=nnx.Rngs(0)),
        build_torch=lambda: named("torch_ref", class_name)(torch_ref.CausalVideoVAEConfig.from_dict(config.to_dict())),
        tolerance=MODEL_TOLERANCE,
        draws=MANY_DRAWS,
        **kwargs,
    )


def whole(
    name: str,
    config: CausalVideoVAEConfig,
    shape: tuple,
    chunk: int | None = None,
    execution: Execution = PLAIN,
    **kwargs,
) -> Case:
    """A row for the whole VAE: the posterior of a clip, and the clip decoded from its mode.

    `execution` is how flax_vae runs it. With `chunk`, it encodes so many frames at a time and decodes as many latents
    as come of them.
    """
    frames, latents = ({}, {}) if chunk is None else ({"chunk": chunk}, {"chunk": chunk // config.temporal_factor})

    def call(vae, x, encode=frames, decode=latents):
        posterior = vae.encode(x, **encode)
        return {"mean": posterior.mean, "logvar": posterior.logvar, "video": vae.decode(posterior.mode(), **decode)}

    def build():
        vae = CausalVideoVAE(config, rngs=nnx.Rngs(0))
        vae.execution = execution
        return vae

    return Case(
        name,
        shape,
        build_flax=build,
        build_torch=lambda: torch_ref.CausalVideoVAE.from_config(config.to_dict()),
        call_flax=call,
        call_torch=lambda vae, x: call(vae, x, {}, {}),
        tolerance=MODEL_TOLERANCE,
        **{"draws": MANY_DRAWS, **kwargs},
    )


def tiled_whole(name: str, config: CausalVideoVAEConfig, shape: tuple, tile: int, overlap: int, **kwargs) -> Case:
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


# The first and the second width of every down block of the released model, and of every up block, as multiples.
DOWN_STEPS, UP_STEPS = ((1, 1), (1, 2), (2, 4), (4, 4)), ((4, 4), (4, 4), (4, 2), (2, 1))


def block(kind: str, index: int, steps: tuple, shape: tuple, width: int = 8, **kwargs) -> Case:
    """A row for one of the released model's down or up blocks, with two residual blocks and both resamplers."""
    before, after = (width * times for times in steps[index])
    name, temporal = f"{kind}-block-{index}", {f"temporal_{kind}sample": True}
    row = layer(name, (*shape, before), f"{kind.title()}Block", before, after, 2, 4, **temporal)
    return replace(row, draws=MANY_DRAWS, **kwargs)


NARROW = narrow((8, 16, 24, 16), groups=4, encoder_layers=1, decoder_layers=2)
NARROWEST = narrow((8, 16, 24, 16), groups=4, encoder_layers=1, decoder_layers=1)
SHALLOW = CausalVideoVAEConfig(
    encoder_out_channels=3, decoder_in_channels=3, encoder_norm_num_groups=3, decoder_norm_num_groups=5,
    encoder_block_out_channels=(6, 9), decoder_block_out_channels=(5, 15),
    encoder_layers_per_block=(1, 2), decoder_layers_per_block=(2, 1),
    encoder_down_block_types=("DownEncoderBlockCausal3D",) * 2, decoder_up_block_types=("UpDecoderBlockCausal3D",) * 2,
    encoder_spatial_down_sample=(True, False), decoder_spatial_up_sample=(False, True),
    encoder_temporal_down_sample=(False, True), decoder_temporal_up_sample=(False, True),
    encoder_block_dropout=(0.0,) * 2, decoder_block_dropout=(0.0,) * 2,
)  # fmt: skip
FULL = CausalVideoVAEConfig.released()
SINGLE = CausalVideoVAEConfig(
    encoder_out_channels=3, decoder_in_channels=3, encoder_norm_num_groups=2, decoder_norm_num_groups=2,
    encoder_block_out_channels=(6,), decoder_block_out_channels=(4,),
    encoder_layers_per_block=(1,), decoder_layers_per_block=(1,),
    encoder_down_block_types=("DownEncoderBlockCausal3D",), decoder_up_block_types=("UpDecoderBlockCausal3D",),
    encoder_spatial_down_sample=(True,), decoder_spatial_up_sample=(True,),
    encoder_temporal_down_sample=(True,), decoder_temporal_up_sample=(True,),
    encoder_block_dropout=(0.0,), decoder_block_dropout=(0.0,),
)  # fmt: skip
UNEVEN = CausalVideoVAEConfig(
    encoder_out_channels=5, decoder_in_channels=5, encoder_norm_num_groups=4, decoder_norm_num_groups=3,
    encoder_block_out_channels=(8, 12, 20), decoder_block_out_channels=(6, 9, 12, 18),
    encoder_layers_per_block=(2, 1, 1), decoder_layers_per_block=(1, 2, 1, 1),
    encoder_down_block_types=("DownEncoderBlockCausal3D",) * 3, decoder_up_block_types=("UpDecoderBlockCausal3D",) * 4,
    encoder_spatial_down_sample=(True, False, True), decoder_spatial_up_sample=(False, True, False, True),
    encoder_temporal_down_sample=(False, True, False), decoder_temporal_up_sample=(False, False, True, False),
    encoder_block_dropout=(0.0,) * 3, decoder_block_dropout=(0.0,) * 4,
)  # fmt: skip


CASES = [
    *(block("down", index, DOWN_STEPS, (1, 5, 6, 5), slow=index % 2 == 1) for index in range(4)),
    replace(
        layer("down-block-plain", (1, 3, 4, 5, 8), "DownBlock", 8, 12, 1, 4, spatial_downsample=False),
        slow_rounded=True,
    ),
    layer("mid-block", (2, 3, 4, 5, 32), "MidBlock", 32, 8),
    *(block("up", index, UP_STEPS, (1, 2, 4, 3), slow=index != 3) for index in range(4)),
    layer("up-block-plain", (1, 3, 4, 5, 8), "UpBlock", 8, 12, 1, 4, spatial_upsample=False),
    part("encoder", "Encoder", NARROW, (1, 9, 9, 16, 3), slow=True),
    part("decoder", "Decoder", NARROW, (1, 2, 3, 2, 16), slow=True),
    *(scaling(variant, method) for variant in ("flux", "sd3") for method in ("normalize", "denormalize")),
    whole("vae-narrow", NARROWEST, (1, 9, 16, 8, 3), slow_rounded=True),
    whole("vae-shallow", SHALLOW, (2, 5, 7, 6, 3), slow=True),
    whole("vae-uneven", UNEVEN, (1, 5, 9, 11, 3), slow=True),
    whole("vae-remat", SINGLE, (2, 3, 5, 4, 3), execution=Execution(remat=True), slow=True),
    whole("vae-chunks", SINGLE, (2, 5, 5, 4, 3), chunk=2, slow=True),
    whole("vae-frame-by-frame", SINGLE, (2, 5, 5, 4, 3), execution=Execution(frame_by_frame=True), slow=True),
    tiled_whole("vae-tiles", SINGLE, (1, 3, 17, 23, 3), 8, 2, gradients=False, slow=True),
    whole("vae-full-335M", FULL, (1, 9, 16, 24, 3), slow=True, large=True, gradients=False, draws=1),
]  # fmt: skip
