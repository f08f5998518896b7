"""`flax-vae info`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from tyro.conf import arg

from flax_vae.cli.options import Checkpoint, Config
from flax_vae.jobs.clip import filled, parse_size
from flax_vae.jobs.model import config_of
from flax_vae.jobs.screen import counted, table

KEYS = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("act_fn", "block_dropout", "spatial_{}_sample", "temporal_{}_sample"),
)
Size = Annotated[
    str | None,
    arg(
        metavar="SIDE|HxW",
        help="size of that clip in pixels: both sides, as 256, or height x width, as 288x512",
        help_behavior_hint="(default: the config's sample_size)",
    ),
]
Frames = Annotated[int, arg(metavar="N", help="frames of the clip whose latents are asked for")]


def info(checkpoint: Checkpoint, size: Size = None, frames: Frames = 17, config: Config = None) -> None:
    """Shows a checkpoint's config, its parameters, and the latents it makes of a clip; reads no weights.

    Also tells whether its tensors are exactly those that the config asks for, and if not, lists what differs.

    Example:
      flax-vae info my_vae --size 288x512 --frames 65
    """
    from flax import nnx

    from flax_vae.io import port
    from flax_vae.io.checkpoint import open_checkpoint
    from flax_vae.models.vae import CausalVideoVAE

    wanted = parse_size(size)
    if frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")
    with open_checkpoint(checkpoint) as source:
        settings = config_of(source, config)
        shapes = source.shapes()
    height, width = wanted if isinstance(wanted, tuple) else (wanted or settings.sample_size,) * 2

    values = settings.to_dict()
    sides = [
        [str(values[f"{side}_{key.format(way)}"]).strip("[]") for side, way in (("encoder", "down"), ("decoder", "up"))]
        for key in KEYS
    ]
    names = [key.format("down/up") for key in KEYS]
    table("config", [(name, *pair) for name, pair in zip(names, sides, strict=True)], ("", "encoder", "decoder"))

    parts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for name, (shape, dtype) in shapes.items():
        parts[port.torch_key(name).split(".")[0]] += math.prod(shape)
        kinds[dtype] += 1
    rows = [*parts.items(), ("all", parts.total())]
    table(f"parameters, stored as {', '.join(f'{kind} ({n} tensors)' for kind, n in kinds.items())}", rows)

    whole = filled(frames, settings.temporal_factor)
    latents = settings.latent_shape(whole, height, width)
    clip = f"{counted(frames)} of {height}x{width}" + f", filled to {whole}" * (whole > frames)
    span = settings.temporal_factor, settings.spatial_factor, settings.spatial_factor
    rows = [("frames, height, width that one spans", times(span)), (f"shape for {clip}", times(latents))]
    table("latents", rows)

    model = nnx.eval_shape(lambda: CausalVideoVAE(settings, rngs=nnx.Rngs(0)))
    port.match(port.parameters(model), shapes, CausalVideoVAE.__name__)
    print(f"{checkpoint}: the {len(shapes)} tensors include all that the config asks for, each of the right shape")


def times(numbers: Iterable[int]) -> str:
    return " x ".join(map(str, numbers))
