"""What a training run leaves in its folder: metrics as columns, and snapshots of a few clips that it shows.

The contact sheet of a snapshot is pictures/{step}.png; what the report shows of it is pictures/frames/{step}.png and
.json.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from flax_vae.io.files import read_json, replacing, to_json
from flax_vae.io.manifest import parsed_lines
from flax_vae.io.pixels import to_uint8
from flax_vae.io.video_reader import read_clip
from flax_vae.io.video_writer import write_image
from flax_vae.metrics.contact_sheet import contact_sheet
from flax_vae.metrics.psnr import MAX_PSNR, psnr
from flax_vae.train.log import METRICS

SHEET_FRAMES = 6  # of a contact sheet, at most
PICTURES, FRAMES = "pictures", "pictures/frames"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at a step: PSNR of all shown frames in dB, number of clips, and the file of their frames."""

    step: int
    psnr: float
    clips: int
    path: Path

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns a frame of every clip, and its reconstruction, as uint8 (clips, H, W, 3) each."""
        rows = "(two h) (clips w) c -> two clips h w c"
        clips, output = rearrange(read_clip(self.path)[0], rows, two=2, clips=self.clips)
        return clips, output


@dataclass(frozen=True)
class History:
    """The contents of a run's folder: its config, its metrics as columns with NaN for missing values, its snapshots."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    snapshots: list[Snapshot]

    @property
    def steps(self) -> np.ndarray:
        """The steps, each as the number of those before it."""
        return self.metrics.get("step", np.zeros(0))

    @property
    def skipped(self) -> np.ndarray:
        """The steps that were skipped, as something in them was not finite."""
        return self.steps[self.metrics.get("skipped", np.zeros(len(self.steps))) > 0]


def save_snapshot(folder: Path, step: int, clips: np.ndarray, output: np.ndarray) -> float:
    """Draws a contact sheet of clips and reconstructions, keeps a frame of each; returns their PSNR, 100 dB at most.

    Both are floats in [-1, 1], (clips, T, H, W, 3); `folder` is the run's, where files of the same step are replaced.
    Raises ValueError for NaN and infinity, as of damaged weights.
    """
    (folder / FRAMES).mkdir(parents=True, exist_ok=True)
    pair = to_uint8(clips), to_uint8(output)
    quality = min(psnr(np.asarray(clips, np.float32), np.clip(np.asarray(output, np.float32), -1, 1)), MAX_PSNR)
    count, frames = clips.shape[:2]
    indices = np.linspace(0, frames - 1, min(frames, max(SHEET_FRAMES // count, 1))).round().astype(int)
    before, after = (x[:SHEET_FRAMES, indices].reshape(-1, *x.shape[2:]) for x in pair)
    heading = f"step {step:,}" + f", {count} clips" * (count > 1)
    numbers = [int(index) for index in indices] * min(count, SHEET_FRAMES)
    contact_sheet(folder / PICTURES / f"{step:08d}.png", before, after, heading, numbers, quality)
    middle = rearrange([x[:, frames // 2] for x in pair], "two clips h w c -> (two h) (clips w) c")
    path = folder / FRAMES / f"{step:08d}.png"
    write_image(path, middle)
    with replacing(path.with_suffix(".json")) as part:  # written last: where it is, the other files are complete
        part.write_text(to_json({"step": step, "psnr": quality, "clips": count}) + "\n", encoding="utf-8")
    return quality


def read_history(folder: Path) -> History:
    """Reads the folder of a run, which may still go on; what is missing is left out."""
    config = folder / "config.json"
    metrics = read_columns(folder / METRICS)
    if "mse" in metrics:
        with np.errstate(divide="ignore"):
            metrics["psnr"] = 10 * np.log10(4 / metrics["mse"])
    return History(
        name=folder.absolute().name,
        config=read_json(config) if config.exists() else {},
        metrics=metrics,
        snapshots=[
            Snapshot(**read_json(path), path=path.with_suffix(".png"))
            for path in sorted((folder / FRAMES).glob("*.json"))
        ],
    )


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Reads JSON lines of numbers as columns by name, NaN where a line has none; a torn last line is left out."""
    lines = list(parsed_lines(path))
    columns = defaultdict[str, np.ndarray](lambda: np.full(len(lines), np.nan))
    for i, line in enumerate(lines):
        for name, value in line.items():
            try:
                columns[name][i] = np.nan if value is None else value
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{path}: {name} is {value!r:.99}, expected a number") from None
    return dict(columns)
