"""`flax-vae info`."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from flax_vae.cli.options import Checkpoint, Config, described
from flax_vae.cli.port import Part, Variant
from flax_vae.jobs.screen import counted, table

SIZE = "size of that clip in pixels: both sides, as 256, or height x width, as 288x512"
Size = Annotated[str | None, described("SIDE|HxW", SIZE, "the config's sample_size")]
Frames = Annotated[int, described("N", "frames of the clip whose latents are asked for")]


def info(
    checkpoint: Checkpoint,
    size: Size = None,
    frames: Frames = 17,
    config: Config = None,
    variant: Variant = None,
    part: Part = None,
) -> None:
    """Shows a checkpoint's config, its parameters, and the latents it makes of a clip.

    Also tells whether its tensors are exactly those that the config asks for, and if not, lists what differs; and
    reads them once, to name those that hold values that are not finite.

    Example:
      flax-vae info my_vae --size 288x512 --frames 65
    """
    from flax_vae.families import registry
    from flax_vae.io.pixels import parse_size
    from flax_vae.io.port import match
    from flax_vae.jobs.model import config_of
    from flax_vae.jobs.port import is_finite, warn_of

    wanted = parse_size(size)
    if frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")
    if wanted is not None and min((wanted,) if isinstance(wanted, int) else wanted) < 1:
        raise ValueError(f"--size {size}: expected 1 pixel or more")
    source = registry.open_source(checkpoint, variant=variant, part=part)
    settings, shapes = config_of(source, config), source.shapes()
    side = settings.sample_size if wanted is None else wanted
    height, width = side if isinstance(side, tuple) else (side, side)
    columns, rows = settings.describe()
    table("config", rows, columns)

    whole = settings.fitted_frames(frames, "pad")
    latents = settings.latent_shape(whole, height, width)
    clip = f"{counted(frames)} of {height}x{width}" + f", filled to {whole}" * (whole > frames)
    span = settings.temporal_factor, settings.spatial_factor, settings.spatial_factor
    rows = [("frames, height, width that one spans", times(span)), (f"shape for {clip}", times(latents))]
    table("latents", rows)

    names = match(registry.abstract(settings), shapes, source.origin)
    parts: Counter[str] = Counter()
    for key, name in names.items():
        parts[key.split(".")[0]] += math.prod(shapes[name][0])
    kinds = Counter(shapes[name][1] for name in names.values())
    stored = ", ".join(f"{kind} ({n} tensors)" for kind, n in kinds.items())
    table(f"parameters, stored as {stored}", [*parts.items(), ("all", parts.total())])
    print(f"{checkpoint}: the {len(names)} tensors are all that the config asks for, each of the right shape")
    if others := sorted(shapes.keys() - set(names.values())):
        print(f"{checkpoint}: {counted(len(others), 'tensor')} of other parts left out, such as {others[0]}")
    warn_of([name for name in names.values() if not is_finite(source.read(name))])


def times(numbers: Iterable[int]) -> str:
    return " x ".join(map(str, numbers))
