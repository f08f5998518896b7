"""`flax-vae extract`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from flax_vae.cli.options import (
    NO_CLUSTER,
    PLAINLY,
    Computing,
    Frames,
    How,
    LossyTiles,
    Memory,
    Processes,
    Size,
    Weights,
)
from flax_vae.jobs.budget import read_budget
from flax_vae.jobs.clip import Clip, open_clip
from flax_vae.jobs.extraction import LATENTS, Extraction
from flax_vae.jobs.model import check_stream, load, read_config
from flax_vae.jobs.screen import note, table
from flax_vae.runtime.cluster import joined

if TYPE_CHECKING:
    from flax_vae.io.manifest import Entry
    from flax_vae.models.statistics import LatentStatistics

Source = Annotated[
    Path,
    Positional,
    arg(
        metavar="FOLDER_OR_MANIFEST",
        help='folder with videos and images, also in folders of it; or a file with a line {"video": path} or '
        '{"image": path} a clip, paths from the folder of that file',
    ),
]
Out = Annotated[Path, Positional, arg(metavar="OUT", help="folder to write; made if it is not there, or gone on with")]
Part = Annotated[
    str | None,
    arg(
        metavar="K/N",
        help="do the K-th of N parts, so that N processes, here or on other machines, share the work on one OUT",
        help_behavior_hint="(default: all, or in a cluster the part of this process)",
    ),
]
MANIFEST, FAILED, STATISTICS = "manifest.jsonl", "failed.jsonl", "statistics.json"


def extract(
    source: Source,
    out: Out,
    weights: Weights,
    size: Size = None,
    frames: Frames = None,
    memory: Memory = None,
    how: How = PLAINLY,
    part: Part = None,
    lossy_tiles: LossyTiles = False,
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
    if part is not None and cluster.is_asked_for:
        raise ValueError(f"--part {part}: in a cluster each process does the part of its number; leave it out")
    with joined(cluster) as (process, processes):
        own = (process + 1, processes) if part is None else read_part(part)
        extract_part(own, source, out, weights, size, frames, memory, how, lossy_tiles)


def extract_part(
    part: tuple[int, int],
    source: Path,
    out: Path,
    weights: str,
    size: str | None,
    frames: int | None,
    memory: str | None,
    how: Computing,
    lossy_tiles: bool,
) -> None:
    """Encodes every N-th clip from the K-th on, and finishes OUT where nothing is left to be done."""
    from flax_vae.io.files import scratch
    from flax_vae.io.manifest import Log, read_entries

    number, parts = part
    config, budget, entries = read_config(weights), read_budget(memory), read_entries(source)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it first")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder to write")
    logs = check_parts(out, parts)
    check_stream(how.mesh, config, ())

    def open_entry(path: Path) -> Clip:
        clip = open_clip(path, config, size, frames)
        check_stream(how.mesh, config, [(clip.height, clip.width)])
        return clip

    model = load(weights, how, lossy_tiles)
    settings = {"size": size, "frames": frames, **model.identity}
    check_settings(logs, settings)
    (out / LATENTS).mkdir(parents=True, exist_ok=True)
    own = logs[number - 1]
    with Log(own, settings) as log, scratch(own.with_name(f".{own.stem}")) as folder:
        mine = [entry for i, entry in enumerate(entries) if i % parts == number - 1]
        Extraction(out, model, budget, log, folder).run(mine, open_entry)
        finish(source, out, entries, logs, folder)


def read_part(text: str) -> tuple[int, int]:
    """Reads "2/4" as (2, 4); ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--part {text}: expected the number of this part and of all parts, as 1/4")
    return int(found[1]), int(found[2])


def check_parts(out: Path, parts: int) -> list[Path]:
    """Gives the log of each part; ValueError where OUT was begun with another number of parts."""
    logs = [out / f"log-{k:05d}-of-{parts:05d}.jsonl" for k in range(1, parts + 1)]
    if others := sorted(path.name for path in set(out.glob("log-*.jsonl")) - set(logs)):
        raise ValueError(f"{out}: was begun with another number of parts ({others[0]}); write elsewhere, or as begun")
    return logs


def check_settings(logs: Sequence[Path], settings: Mapping[str, object]) -> None:
    """Raises ValueError where another part was begun otherwise; only the machine may be another."""
    from flax_vae.io.manifest import as_json, read_settings

    for log in logs:
        before = read_settings(log)
        if before and {**before, "device": None} != as_json({**settings, "device": None}):
            raise ValueError(f"{log}: was begun otherwise, with {json.dumps(before)}; write elsewhere, or as begun")


def finish(source: Path, out: Path, entries: Sequence[Entry], logs: Sequence[Path], folder: Path) -> None:
    """Writes the manifest, the list of failures and the statistics, once every clip is done or has failed."""
    from flax_vae.io.manifest import read_log, write_lines
    from flax_vae.models.statistics import LatentStatistics

    kinds = {str(entry.path): entry.kind for entry in entries}
    latents: dict[str, str] = {}
    errors: dict[str, str] = {}
    total = None
    for line in (line for log in logs for line in read_log(log)):
        path = line["path"]
        if "error" in line:
            errors[path] = line["error"]
        elif path in kinds and path not in latents:  # another part may have done it before the list of clips changed
            latents[path] = line["latents"]
            part = LatentStatistics.from_dict(line["statistics"])
            total = part if total is None else total + part
    if missing := kinds.keys() - latents.keys() - errors.keys():
        note(f"{len(missing)} of {len(kinds)} clips are other parts' to do; the last to end writes {out / STATISTICS}")
        return
    failed = [path for path in kinds if path not in latents]
    write_lines(folder / MANIFEST, ({kinds[path]: path, "latents": latents[path]} for path in kinds if path in latents))
    write_lines(folder / FAILED, ({kinds[path]: path, "error": errors[path]} for path in failed))
    rows = [("clips encoded", len(kinds) - len(failed)), ("clips that cannot be read", len(failed))]
    if total is not None:
        write_statistics(folder / STATISTICS, total)
        rows += [("first latent frames: mean, std over all channels", total.first.overall())]
        rows += [("later latent frames: mean, std over all channels", total.rest.overall())]
    for path in sorted(folder.iterdir()):
        os.replace(path, out / path.name)
    table(f"{source} to {out}", rows)
    for path in failed[:9]:
        note(f"left out: {errors[path]}")
    if len(failed) > 9:
        note(f"and {len(failed) - 9} more, in {out / FAILED}")


def write_statistics(path: Path, total: LatentStatistics) -> None:
    """Writes the mean and standard deviation of every channel, and the scaling that they make."""
    try:
        scaling = total.scaling().to_dict()
    except ValueError as error:
        note(str(error))
        scaling = None
    path.write_text(json.dumps({**total.summary(), "scaling": scaling}, indent=2) + "\n", encoding="utf-8")
