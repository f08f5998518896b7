"""`flax-vae encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from flax_vae.cli.clip import check_target, filled, open_clip
from flax_vae.cli.latents import Latents, save
from flax_vae.cli.model import config_hash, load, read_config
from flax_vae.cli.options import Frames, Size, Video, Weights
from flax_vae.cli.screen import note, progress, table

Out = Annotated[Path, Positional, arg(metavar="OUT.safetensors", help="latents file to write; replaced if it exists")]


def encode(video: Video, out: Out, weights: Weights, size: Size = None, frames: Frames = None) -> None:
    """Encodes a clip of any length to latents, a chunk at a time.

    OUT.safetensors gets `mean` and `logvar`, float32 (1, t, h, w, z), and as metadata the number of frames, frames
    per second, height and width of the clip, and the hash of the model's config. A clip whose frames are not
    8k + 1 is filled by repeating its last frame; decode cuts the repeats off again.

    Example:
      flax-vae encode clip.mp4 clip.safetensors --weights my_vae --size 256
    """
    check_target(out, [".safetensors"], video)
    config = read_config(weights)
    clip = open_clip(video, config, size, frames)
    vae = load(weights)

    from flax_vae.io.pixels import to_float
    from flax_vae.layers.geometry import latent_frames
    from flax_vae.runtime.stream import compiled, stream

    means, logvars, lengths = [], [], []

    def batches():
        for chunk, length in clip.chunks():
            lengths.append(length)
            yield to_float(chunk)[None]

    with progress("encoding", clip.expected) as meter:
        for posterior in stream(compiled(vae.encode_chunk), batches()):
            means.append(np.asarray(posterior.mean))
            logvars.append(np.asarray(posterior.logvar))
            meter.done(lengths[-1])
    clip.report(meter.frames)
    latents = latent_frames(filled(meter.frames, clip.factor), clip.factor)
    mean, logvar = (np.concatenate(parts, axis=1)[:, :latents] for parts in (means, logvars))
    save(out, Latents(mean, logvar, meter.frames, clip.height, clip.width, clip.fps, config_hash(config)))
    rows = [
        ("latents (batch, frames, height, width, channels)", " x ".join(map(str, mean.shape))),
        ("mean, standard deviation of the means", f"{mean.mean():.4f}, {mean.std():.4f}"),
        ("speed", meter.pace()),
    ]
    table(f"{video} to {out}", rows)
    note(f"wrote {out}")
