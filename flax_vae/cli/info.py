"""`flax-vae info`."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from flax_vae.cli.options import Checkpoint, Config, described
from flax_vae.jobs.screen import counted, table

SIZE = "size of that clip in pixels: both sides, as 256, or height x width, as 288x512"
Size = Annotated[str | None, described("SIDE|HxW", SIZE, "the config's sample_size")]
Frames = Annotated[int, described("N", "frames of the clip whose latents are asked for")]


def info(checkpoint: Checkpoint, size: Size = None, frames: Frames = 17, config: Config = None) -> None:
    """Shows a checkpoint's config, its parameters, and the latents it makes of a clip; reads no weights.

    Also tells whether its tensors are exactly those that the config asks for, and if not, lists what differs.

    Example:
      flax-vae info my_vae --size 288x512 --frames 65
    """
    from flax_vae.families import registry
    from flax_vae.io.pixels import parse_size
    from flax_vae.io.port import match, unwrapped
    from flax_vae.jobs.model import config_of

    wanted = parse_size(size)
    if frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")
    source = registry.open_source(checkpoint)
    settings, shapes = config_of(source, config), source.shapes()
    height, width = wanted if isinstance(wanted, tuple) else (wanted or settings.sample_size,) * 2
    columns, rows = settings.describe()
    table("config", rows, columns)

    parts: Counter[str] = Counter()
    kinds = Counter(dtype for _, dtype in shapes.values())
    for name, names in unwrapped(shapes).items():
        parts[name.split(".")[0]] += sum(math.prod(shapes[one][0]) for one in names)
    rows = [*parts.items(), ("all", parts.total())]
    table(f"parameters, stored as {', '.join(f'{kind} ({n} tensors)' for kind, n in kinds.items())}", rows)

    whole = settings.fitted_frames(frames, "pad")
    latents = settings.latent_shape(whole, height, width)
    clip = f"{counted(frames)} of {height}x{width}" + f", filled to {whole}" * (whole > frames)
    span = settings.temporal_factor, settings.spatial_factor, settings.spatial_factor
    rows = [("frames, height, width that one spans", times(span)), (f"shape for {clip}", times(latents))]
    table("latents", rows)

    match(registry.abstract(settings), shapes)
    print(f"{checkpoint}: the {len(shapes)} tensors include all that the config asks for, each of the right shape")


def times(numbers: Iterable[int]) -> str:
    return " x ".join(map(str, numbers))
