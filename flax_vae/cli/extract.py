"""`flax-vae extract`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flax_vae.cli.options import NO_CLUSTER, CodingOptions, Hidden, Processes, Weights, described
from flax_vae.runtime.cluster import joined

Source = Annotated[
    Positional[Path],
    described(
        "FOLDER_OR_MANIFEST",
        'folder with videos and images, also in folders of it; or a file with a line {"video": path} or '
        '{"image": path} a clip, paths from the folder of that file',
    ),
]
Out = Annotated[Positional[Path], described("OUT", "folder to write; made if it is not there, or gone on with")]
Part = Annotated[
    str | None,
    described(
        "K/N",
        "do the K-th of N parts, so that N processes, here or on other machines, share the work on one OUT",
        "all, or in a cluster the part of this process",
    ),
]


@dataclass(frozen=True)
class ExtractionOptions(CodingOptions):
    """Those without `resume`, which an extraction always does."""

    resume: Hidden[bool] = False


OPTIONS = ExtractionOptions()


def extract(
    source: Source,
    out: Out,
    weights: Weights,
    options: Annotated[ExtractionOptions, arg(name="")] = OPTIONS,
    part: Part = None,
    cluster: Processes = NO_CLUSTER,
) -> None:
    """Encodes a whole data set: every clip of a folder or manifest to latents, and statistics over all of them.

    OUT/latents gets a file for each clip of up to 129 frames, a folder of files for each longer one, as flax-vae
    encode writes them. Short clips of one shape are encoded together. A file that cannot be read is left out and
    listed in OUT/failed.jsonl. When all is done, OUT/manifest.jsonl names the latents of every clip, and
    OUT/statistics.json gives the mean and standard deviation of every channel, for the first frames of clips and for
    later ones, with the scaling that a diffusion model needs (flax-vae encode --scaling).

    The same command goes on after it was stopped, and tries again what could not be read.

    Example:
      flax-vae extract clips/ clips_latents --weights my_vae --size 256x256 --part 1/4
    """
    from flax_vae.jobs import extract as job

    if part is not None and cluster.is_asked_for:
        raise ValueError(f"--part {part}: in a cluster each process does the part of its number; leave it out")
    with joined(cluster) as (process, processes):
        own = (process + 1, processes) if part is None else read_part(part)
        job.extract(source, out, weights, options, own)


def read_part(text: str) -> tuple[int, int]:
    """Reads "2/4" as (2, 4); ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--part {text}: expected the number of this part and of all parts, as 1/4")
    return int(found[1]), int(found[2])
