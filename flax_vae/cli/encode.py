"""`flax-vae encode`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from flax_vae.cli.options import PLAINLY, Frames, How, LossyTiles, Memory, Resume, Size, Video, Weights
from flax_vae.jobs.budget import chunk_latents, read_budget
from flax_vae.jobs.clip import Clip, expected, open_clip
from flax_vae.jobs.model import Model, check_stream, load, read_config
from flax_vae.jobs.pieces import Chunk, run
from flax_vae.jobs.screen import Meter, note, progress, table
from flax_vae.jobs.sources import pairs

if TYPE_CHECKING:
    from flax_vae.io.latents import About
    from flax_vae.jobs.job import Job

Out = Annotated[Path, Positional, arg(metavar="OUT", help="folder to write; replaced if it holds latents")]
Scaling = Annotated[
    str | None,
    arg(
        metavar="flux|sd3|FILE",
        help="statistics to note beside the latents, for a diffusion model to shift and scale them by: a released "
        "variant's, or statistics.json of flax-vae extract",
        help_behavior_hint="(default: none; the latents are stored as the encoder gives them either way)",
    ),
]


def encode(
    video: Video,
    out: Out,
    weights: Weights,
    size: Size = None,
    frames: Frames = None,
    memory: Memory = None,
    how: How = PLAINLY,
    scaling: Scaling = None,
    resume: Resume = False,
    lossy_tiles: LossyTiles = False,
) -> None:
    """Encodes a clip of any length to latents, a chunk at a time.

    OUT gets 00000.safetensors, 00001.safetensors and so on, each with `mean` and `logvar` of the next 16 latent frames
    (17 in the first), float32 (1, t, h, w, z), and as metadata the clip's frames, frames per second and size, and the
    hashes of the model's config and weights. The folder takes its name when all are there. A clip whose frames are not
    8k + 1 is filled by repeating its last frame; decode cuts the repeats off again.

    Example:
      flax-vae encode clip.mp4 clip_latents --weights my_vae --size 256
    """
    from flax_vae.jobs.job import check_begun

    config, budget, statistics = read_config(weights), read_budget(memory), read_scaling(scaling)
    work = [(open_clip(path, config, size, frames), target) for path, target in pairs(video, out, "", resume)]
    check_stream(how.mesh, config, ((clip.height, clip.width) for clip, _ in work))
    for clip, target in work:
        note(clip.about)
        check_folder(target, video.is_dir())
        check_begun(target, resume)
    model = load(weights, how, lossy_tiles)
    if video.is_dir():
        out.mkdir(exist_ok=True)
    with progress("encoding", expected(clip for clip, _ in work)) as meter:
        for clip, target in work:
            clip.report(encode_clip(clip, target, model, statistics, budget, resume, meter))
    if not video.is_dir():
        summary(video, out, meter)
    note(f"wrote {out}: {meter.pace()}")


def encode_clip(
    clip: Clip,
    target: Path,
    model: Model,
    scaling: dict[str, Any] | None,
    budget: int | None,
    resume: bool,
    meter: Meter,
) -> int:
    """Encodes one clip to a folder of latents, or goes on with it; gives the number of its frames."""
    from flax_vae.io.latents import About
    from flax_vae.jobs.job import Job
    from flax_vae.runtime.stream import compiled

    about = About(clip.height, clip.width, clip.fps, model.config_hash, model.weights, scaling)
    step = compiled(model.vae.encode_chunk, model.mesh)
    with Job(target, {"command": "encode", **clip.source, **model.identity, "about": about}, resume) as job:
        meter.already(job.progress.frames)
        if not job.progress.is_complete:
            latents = job.decision("chunk", lambda: chunk_latents(step, clip.shape, clip.expected_latents, budget))
            run(job, step, clip.chunks(latents, job.progress.frames), LatentPieces(job, about), meter)
        job.become()
    return job.progress.frames


class LatentPieces:
    """Collects the distributions of latents and writes each piece to a file."""

    def __init__(self, job: Job, about: About):
        self.job, self.about = job, about
        self._start, self._frames = job.progress.latents, 0
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def __enter__(self) -> LatentPieces:
        return self

    def __exit__(self, *exception) -> None: ...

    def add(self, result: Any, chunk: Chunk) -> None:
        """Keeps the latents of a chunk that are no filling."""
        mean, logvar = (np.asarray(x, np.float32)[:, : chunk.latents] for x in (result.mean, result.logvar))
        self._parts.append((mean, logvar))
        self._frames += chunk.frames

    def finish(self, is_last: bool) -> None:
        """Writes what was added since the last piece."""
        from flax_vae.io.latents import SUFFIX, write_latents

        mean, logvar = (np.concatenate(parts, axis=1) for parts in zip(*self._parts, strict=True))
        write_latents(self.job.piece(SUFFIX), self.about, mean, logvar, self._frames, self._start, is_last)
        self._start, self._frames, self._parts = self._start + mean.shape[1], 0, []


def read_scaling(scaling: str | None) -> dict[str, Any] | None:
    """Gives the statistics of a released variant, or those in a file; ValueError where it holds none."""
    from flax_vae.io.checkpoint import read_json
    from flax_vae.models.latents import LatentScaling

    if scaling is None:
        return None
    if not Path(scaling).is_file():
        return LatentScaling.released(scaling).to_dict()
    try:
        return LatentScaling.from_dict(read_json(Path(scaling)).get("scaling", {})).to_dict()
    except ValueError as error:
        raise ValueError(f"{scaling}: holds no statistics of latents ({error})") from None


def check_folder(path: Path, parent_is_made: bool) -> None:
    """Raises unless `path` can become a folder of latents without harm to anything else."""
    from flax_vae.io.latents import SUFFIX

    if not parent_is_made and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; give a folder to write")
    held = [entry.name for entry in path.iterdir()] if path.exists() else []
    if others := [name for name in held if not re.fullmatch(rf"\d{{5,}}\{SUFFIX}", name)]:
        raise ValueError(f"{path}: holds other files than latents, {', '.join(sorted(others)[:9])}; write elsewhere")


def summary(video: Path, out: Path, meter: Meter) -> None:
    """Prints what has been written."""
    from flax_vae.io.latents import Latents

    latents = Latents(out)
    rows = [
        ("latents (batch, frames, height, width, channels)", " x ".join(map(str, (1, *latents.shape)))),
        ("files", len(latents.shards)),
        ("frames", latents.frames),
        ("speed", meter.pace()),
    ]
    table(f"{video} to {out}", rows)
