"""`flax-vae encode`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from flax_vae.cli.options import CODING, Coding, Video, Weights, described
from flax_vae.jobs.screen import note, table

Out = Annotated[Positional[Path], described("OUT", "folder to write; replaced if it holds latents")]
Scaling = Annotated[
    str | None,
    described(
        "flux|sd3|FILE",
        "statistics to note beside the latents, for a diffusion model to shift and scale them by: a released "
        "variant's, or statistics.json of flax-vae extract",
        "none; the latents are stored as the encoder gives them either way",
    ),
]


def encode(video: Video, out: Out, weights: Weights, options: Coding = CODING, scaling: Scaling = None) -> None:
    """Encodes a clip of any length to latents, a chunk at a time.

    OUT gets 00000.safetensors, 00001.safetensors and so on, each with `mean` and `logvar` of the next 16 latent frames
    (17 in the first), float32 (1, t, h, w, z), and as metadata the clip's frames, frames per second and size, and the
    hashes of the model's config and weights. The folder takes its name when all are there. A clip whose frames make no
    whole latents is filled by repeating its last frame; decode cuts the repeats off again.

    Example:
      flax-vae encode clip.mp4 clip_latents --weights my_vae --size 256
    """
    from flax_vae.io.latents import Latents
    from flax_vae.jobs import encode as job

    meter, attempts = job.encode(video, out, weights, options, scaling)
    if not video.is_dir():
        latents = Latents(out)
        rows = [
            ("latents (batch, frames, height, width, channels)", " x ".join(map(str, (1, *latents.shape)))),
            ("files", len(latents.shards)),
            ("frames", latents.frames),
            ("speed", meter.pace()),
        ]
        table(f"{video} to {out}", rows)
    if attempts.done:
        note(f"wrote {out}: {meter.pace()}")
    attempts.check()
