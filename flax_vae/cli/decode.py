"""`flax-vae decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from flax_vae.cli.clip import CHUNK_LATENTS, check_target, filled
from flax_vae.cli.latents import load as load_latents
from flax_vae.cli.model import config_hash, load, read_config
from flax_vae.cli.options import Clip, Weights
from flax_vae.cli.screen import note, progress

In = Annotated[Path, Positional, arg(metavar="IN.safetensors", help="latents file that flax-vae encode has written")]


def decode(latents: In, out: Clip, weights: Weights) -> None:
    """Decodes latents to a clip, a chunk at a time; the means are decoded, nothing is sampled.

    The checkpoint must be the one that encoded them; latents of a model with another config are refused.

    Example:
      flax-vae decode clip.safetensors clip_again.mp4 --weights my_vae
    """
    from flax_vae.io.pixels import to_uint8
    from flax_vae.io.writer import SUFFIXES, VideoWriter

    check_target(out, SUFFIXES, latents)
    source, config = load_latents(latents), read_config(weights)
    if source.config != (ours := config_hash(config)):
        raise ValueError(
            f"{latents} comes from a model of another config (hash {source.config}; that of {weights} is {ours}): "
            "decode with the checkpoint that encoded it"
        )
    frames = filled(source.frames, config.temporal_factor)
    expected = (1, *config.latent_shape(frames, source.height, source.width))
    if source.mean.shape != expected:
        raise ValueError(f"{latents}: latents of shape {source.mean.shape}, expected {expected}; encode the clip again")
    writer = VideoWriter(out, source.fps, source.height, source.width)
    vae = load(weights)

    from flax_vae.runtime.stream import compiled, cut, stream

    with progress("decoding", source.frames) as meter, writer:
        chunks = (chunk[None] for chunk in cut(source.mean[0], CHUNK_LATENTS))
        for video in stream(compiled(vae.decode_chunk), chunks):
            pixels = to_uint8(np.asarray(video[0]))[: source.frames - meter.frames]
            writer.write(pixels)
            meter.done(len(pixels))
    note(f"wrote {out}: {meter.pace()}")
