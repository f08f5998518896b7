"""`flax-vae decode`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flax_vae.cli.options import Clip, CodingOptions, Hidden, Weights, described
from flax_vae.jobs.screen import note

In = Annotated[
    Positional[Path],
    described("IN", "latents: a folder that flax-vae encode has written, or one file; or a folder of such"),
]


@dataclass(frozen=True)
class DecodingOptions(CodingOptions):
    """Those without how clips are read."""

    size: Hidden[str | None] = None
    frames: Hidden[int | None] = None


OPTIONS = DecodingOptions()


def decode(
    latents: In, out: Clip, weights: Weights, options: Annotated[DecodingOptions, arg(name="")] = OPTIONS
) -> None:
    """Decodes latents to a clip, a chunk at a time; the means are decoded, nothing is sampled.

    The checkpoint must be the one that encoded them; latents of a model with another config are refused. Latents hold
    no sound.

    Example:
      flax-vae decode clip_latents clip_again.mp4 --weights my_vae
    """
    from flax_vae.jobs import decode as job

    meter, attempts = job.decode(latents, out, weights, options)
    if attempts.done:
        note(f"wrote {out}: {meter.pace()}")
    attempts.check()
