"""What comes of an evaluation: eval.json, eval.png, and the table on the screen."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flax_vae.io.files import replacing, to_json
from flax_vae.jobs.evaluation.picture import draw
from flax_vae.jobs.evaluation.scores import ClipQuality, Evaluation, seam_text
from flax_vae.jobs.screen import counted, first_few, note, table
from flax_vae.metrics.fvd import CLASSES, FRAMES
from flax_vae.metrics.seams import SEAM, Seam, by_frame, by_position, shortest

JSON, PICTURE = "eval.json", "eval.png"
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
FORMAT = {"psnr": "{:6.2f}", "ssim": "{:.4f}", "lpips": "{:.4f}"}
MAX_ROWS = 30  # clips in the table


def write(out: Path, evaluation: Evaluation, about: dict[str, Any]) -> None:
    """Writes eval.json and eval.png to a folder, which is made where it is missing."""
    out.mkdir(exist_ok=True)
    with replacing(out / JSON) as part:
        part.write_text(to_json({**about, **as_dict(evaluation)}, default=str) + "\n", encoding="utf-8")
    draw(out / PICTURE, evaluation, title(about["checkpoint"], Path(about["data"])))


def title(checkpoint: str, data: Path) -> str:
    """Returns what the picture is of: it may be shown to others, whom the folders of this machine do not concern."""
    name = Path(checkpoint).absolute().name if Path(checkpoint).exists() else checkpoint  # or a name on the hub
    return f"{name} on {data.name}"


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Returns all numbers as eval.json holds them."""
    names, seam = evaluation.names, evaluation.seam()
    frames = {name: evaluation.frames(name) for name in names}
    totals = {"clips": len(evaluation.clips), "failed": len(evaluation.failed), "frames": evaluation.count}
    rfvd = {"value": evaluation.rfvd, "windows": len(evaluation.windows), "frames_of_a_window": FRAMES}
    return {
        "overall": totals | {name: rounded(evaluation.mean(name)) for name in names},
        "chunk": {"frames": evaluation.chunk, "frames_of_a_latent": evaluation.factor},
        "seam": {"definition": SEAM, **({"score": None} if seam is None else seam.to_dict())},
        "rfvd": rfvd if evaluation.has_rfvd else None,
        "by_frame": {name: rounded(by_frame(frames[name])) for name in names},
        "by_position_in_chunk": {name: rounded(by_position(frames[name], evaluation.chunk)) for name in names},
        "clips": [clip_dict(clip, evaluation) for clip in evaluation.clips],
        "failed": [{"path": str(path), "error": error} for path, error in evaluation.failed],
    }


def clip_dict(clip: ClipQuality, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the numbers of one clip: means, and those of every frame."""
    seam = evaluation.seam([clip])
    about = {"path": str(clip.clip.path), "frames": clip.frames, "height": clip.clip.height, "width": clip.clip.width}
    means = {name: rounded(clip.mean(name)) for name in evaluation.names}
    frames = {name: rounded(clip.scores[name]) for name in evaluation.names}
    return {**about, **means, "seam": seam and seam.to_dict(), "by_frame": frames}


def rounded(value: Any) -> Any:
    """Rounds a number, or those in a list, to five decimals."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value if value is None else round(value, 5)


def show(data: Path, evaluation: Evaluation) -> None:
    """Prints a row for each clip, the mean, and notes on them."""
    clips, count, names = evaluation.clips, len(evaluation.clips), evaluation.names
    if count > MAX_ROWS:
        clips = sorted(clips, key=lambda clip: clip.mean("psnr"))[:MAX_ROWS]
        note(f"the {MAX_ROWS} of {count:,} clips with the lowest PSNR; all are in {JSON}")
    rows = [clip_row(data, clip, evaluation) for clip in clips]
    means = cells(evaluation, names, evaluation.seam())
    rows.append([f"mean of {counted(count, 'clip')}", f"{evaluation.count:,}", "", *means])
    columns = ["clip", "frames", "size", *(LABELS[name] for name in names), "seam, dB"]
    if (rfvd := evaluation.rfvd) is not None:
        columns.append("rFVD")
        rows = [*([*row, ""] for row in rows[:-1]), [*rows[-1], f"{rfvd:.1f}"]]
    table(f"{data}: {counted(evaluation.count)}", rows, columns)
    for message in remarks(evaluation):
        note(message)


def clip_row(data: Path, clip: ClipQuality, evaluation: Evaluation) -> list[str]:
    """Returns a clip's row of the table."""
    path = clip.clip.path
    name = str(path.relative_to(data.absolute())) if data.is_dir() else path.name
    words = cells(clip, evaluation.names, evaluation.seam([clip]))
    return [name, f"{clip.frames:,}", f"{clip.clip.height}x{clip.clip.width}", *words]


def cells(of: ClipQuality | Evaluation, names: Sequence[str], seam: Seam | None) -> list[str]:
    """Returns the scores of a clip, or of all, in words."""
    return [*(FORMAT[name].format(of.mean(name)) for name in names), seam_text(seam) if seam else ""]


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """Yields notes on the clips that were measured, and on those that were not."""
    counts, config = [clip.frames for clip in evaluation.clips], evaluation.clips[0].clip.config
    if changed := sum(config.fitted_frames(count, "pad") != count for count in counts):
        law = f"{config.frame_law()} frames"
        yield f"{changed} of {len(counts)} clips have not {law}: the last one was repeated, which is not measured"
    if short := sum(clip.clip.limit is not None and clip.frames < clip.clip.limit for clip in evaluation.clips):
        yield f"{short} of {len(counts)} clips have fewer frames than asked for"
    if evaluation.seam() is None and (needed := shortest(evaluation.chunk, evaluation.factor)):
        yield f"no seam score: it needs a clip of {needed} frames or more"
    windows = len(evaluation.windows)
    if evaluation.has_rfvd and windows < 2:
        yield f"no rFVD: it needs two windows of {FRAMES} frames or more"
    elif evaluation.has_rfvd and windows <= CLASSES:
        yield f"rFVD is of {windows} windows, where thousands are needed: compare it on the same clips alone"
    if evaluation.failed:
        yield f"{len(evaluation.failed)} of {len(counts) + len(evaluation.failed)} clips are left out:"
        yield from first_few([error for _, error in evaluation.failed])
