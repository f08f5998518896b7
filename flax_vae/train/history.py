"""What a training run leaves in its folder to be looked at: metrics as columns, and pictures of a few clips.

A picture is pictures/{step}.png; what the report shows of it is pictures/frames/{step}.png and .json.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from flax_vae.io.files import replacing
from flax_vae.io.manifest import whole_lines
from flax_vae.io.pixels import to_uint8
from flax_vae.io.video_reader import read_clip
from flax_vae.io.video_writer import write_image
from flax_vae.metrics.contact_sheet import contact_sheet
from flax_vae.metrics.psnr import psnr
from flax_vae.train.log import METRICS

SHEET = 6  # frames of a contact sheet
PICTURES, FRAMES = "pictures", "pictures/frames"


@dataclass(frozen=True)
class Kept:
    """What was kept at a step: the PSNR of all shown frames in dB, how many clips, and the file with their frames."""

    step: int
    psnr: float
    clips: int
    path: Path

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads a frame of every clip, and its reconstruction, as uint8 (clips, H, W, 3) each."""
        before, after = rearrange(
            read_clip(self.path)[0], "(two h) (clips w) c -> two clips h w c", two=2, clips=self.clips
        )
        return before, after


@dataclass(frozen=True)
class History:
    """All that a run's folder tells: its config, its metrics as columns with NaN where there is none, its pictures."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    kept: list[Kept]

    @property
    def steps(self) -> np.ndarray:
        """Gives the numbers of the steps: how many there had been before each."""
        return self.metrics.get("step", np.zeros(0))

    @property
    def skipped(self) -> np.ndarray:
        """Gives the numbers of the steps that were skipped, as something in them was not finite."""
        return self.steps[self.metrics.get("skipped", np.zeros(len(self.steps))) > 0]


def keep_picture(folder: Path, step: int, shown: np.ndarray, again: np.ndarray) -> float:
    """Draws clips beside their reconstructions, and keeps a frame of each for the report; gives the PSNR in dB.

    Both are floats in [-1, 1], (clips, T, H, W, 3); `folder` is the run's. The files of a step done twice are
    replaced. Raises ValueError for NaN, as of damaged weights.
    """
    (folder / FRAMES).mkdir(parents=True, exist_ok=True)
    before, after = to_uint8(shown), to_uint8(again)
    quality = psnr(np.asarray(shown, np.float32), np.clip(np.asarray(again, np.float32), -1, 1))
    clips, frames = before.shape[:2]
    places = np.linspace(0, frames - 1, min(frames, max(SHEET // clips, 1))).round().astype(int)
    pair = [x[:SHEET, places].reshape(-1, *x.shape[2:]) for x in (before, after)]
    heading = f"step {step:,}" + f", {clips} clips" * (clips > 1)
    numbers = [int(place) for place in places] * min(clips, SHEET)
    contact_sheet(folder / PICTURES / f"{step:08d}.png", pair[0], pair[1], heading, numbers, quality)
    middle = rearrange([before[:, frames // 2], after[:, frames // 2]], "two clips h w c -> (two h) (clips w) c")
    path = folder / FRAMES / f"{step:08d}.png"
    write_image(path, middle)
    with replacing(path.with_suffix(".json")) as part:  # last: where it is, the others are
        part.write_text(json.dumps({"step": step, "psnr": quality, "clips": clips}) + "\n", encoding="utf-8")
    return quality


def read_history(folder: Path) -> History:
    """Reads what a run has left in its folder, which may still be written; what is missing is left out."""
    config = folder / "config.json"
    metrics = read_columns(folder / METRICS)
    if "mse" in metrics:
        with np.errstate(divide="ignore"):
            metrics["psnr"] = 10 * np.log10(4 / metrics["mse"])
    return History(
        name=folder.absolute().name,
        config=json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        metrics=metrics,
        kept=[
            Kept(**json.loads(path.read_text(encoding="utf-8")), path=path.with_suffix(".png"))
            for path in sorted((folder / FRAMES).glob("*.json"))
        ],
    )


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Reads JSON lines of numbers as a column a name, NaN where a line has none; not one that was cut off."""
    columns: dict[str, array] = {}
    count = 0
    for count, line in enumerate(whole_lines(path), 1):
        for name, value in json.loads(line).items():
            column = columns.setdefault(name, array("d"))
            column.extend([math.nan] * (count - 1 - len(column)))
            column.append(math.nan if value is None else value)
    return {name: np.array([*column, *[math.nan] * (count - len(column))]) for name, column in columns.items()}
