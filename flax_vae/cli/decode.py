"""`flax-vae decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flax_vae.cli.options import COMPUTING, READING, Clip, Computing, LossyTiles, Resume, Weights, options

In = Annotated[
    Path,
    Positional,
    arg(metavar="IN", help="latents: a folder that flax-vae encode has written, or one file; or a folder of such"),
]


def decode(
    latents: In,
    out: Clip,
    weights: Weights,
    computing: Computing = COMPUTING,
    resume: Resume = False,
    lossy_tiles: LossyTiles = False,
) -> None:
    """Decodes latents to a clip, a chunk at a time; the means are decoded, nothing is sampled.

    The checkpoint must be the one that encoded them; latents of a model with another config are refused. Latents hold
    no sound.

    Example:
      flax-vae decode clip_latents clip_again.mp4 --weights my_vae
    """
    from flax_vae.jobs import decode as job
    from flax_vae.jobs.screen import note

    meter = job.decode(latents, out, weights, options(READING, computing, resume, lossy_tiles))
    note(f"wrote {out}: {meter.pace()}")
