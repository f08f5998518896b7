"""Finds the layer at which flax_vae departs from torch_ref: `python -m parity.drift CHECKPOINT [--video CLIP]`.

Both load the checkpoint on their own. torch_ref runs the clip; at every layer ours gets the input that torch's layer
got, so that an error shows where it is made and not in all that follows. A layer that departs is then compared with
what torch_ref would compute if it made each of the known mistakes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_vae
import torch_ref
from flax_vae.io.pixels import fit_size, to_float
from flax_vae.io.video_reader import probe, read_clip
from parity.compare import DTYPES
from parity.mistakes import MISTAKES, made
from torch_ref.families import pyramid
from torch_ref.layers import attention, conv, norm, resample, resnet

# Largest relative difference that rounding explains in one layer.
ROUNDING = {"float64": 1e-11, "float32": 3e-5, "bfloat16": 6e-2}
COMPARED = (
    conv.CausalConv3d,
    norm.CausalGroupNorm,
    attention.Attention,
    resample.SpatialDownsample,
    resample.TemporalDownsample,
    resample.SpatialUpsample,
    resample.TemporalUpsample,
    resnet.CausalResnetBlock,
    pyramid.DownBlock,
    pyramid.MidBlock,
    pyramid.UpBlock,
)


@dataclass(frozen=True)
class Departure:
    """A layer's relative difference from torch on the same input, and the mistakes that would explain it."""

    path: str
    layer: str
    error: float
    departs: bool
    causes: tuple[str, ...] = ()


def layer_at(model: nnx.Module, path: str) -> Any:
    """Returns our layer at torch's attribute path; the names are the same."""

    def child(module: Any, name: str) -> Any:
        return module[int(name)] if name.isdigit() else getattr(module, name)

    return reduce(child, path.split("."), model)


def difference(ours: np.ndarray, torchs: torch.Tensor) -> float:
    """Returns the largest difference relative to torch's largest value; infinite for another shape or a NaN."""
    expected = torchs.detach().double().numpy()
    if ours.shape != expected.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - expected).max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny))


def run_ours(layer, x: torch.Tensor, dtype: str) -> np.ndarray:
    """Runs one of our layers on torch's input, B C T H W; gives its output in the same layout."""
    clip = jnp.asarray(x.detach().double().permute(0, 2, 3, 4, 1).numpy(), dtype)
    with jax.default_matmul_precision("highest"):
        y = layer(clip)
    return np.moveaxis(np.asarray(y[0] if isinstance(y, tuple) else y, np.float64), -1, 1)


def likely_causes(layer: torch.nn.Module, x: torch.Tensor, ours: np.ndarray, error: float) -> tuple[str, ...]:
    """Names the mistakes with which torch's layer comes much closer to our output, the closest first."""
    found = []
    for mistake in MISTAKES:
        if not (isinstance(mistake.layer, type) and isinstance(layer, mistake.layer)):
            continue
        with made(mistake), torch.no_grad():
            left = difference(ours, layer(x))
        if left < 0.1 * error:
            found.append((left, mistake.cause))
    return tuple(cause for _, cause in sorted(found))


def compare_layers(
    ours: flax_vae.CausalVideoVAE,
    torchs: torch_ref.CausalVideoVAE,
    video: np.ndarray,
    dtype: str = "float64",
    progress: Callable[[Departure], None] = lambda _: None,
) -> list[Departure]:
    """Compares every layer on one clip (1, T, H, W, 3); the rows are in the order in which layers finish."""
    rows, torchs = [], torchs.to(DTYPES[dtype]).eval()

    def compare(path: str):
        def hook(layer, inputs, output):
            handle = handles.pop(path)
            handle.remove()  # trying out mistakes runs the layer again
            mine = run_ours(layer_at(ours, path), inputs[0], dtype)
            error = difference(mine, output)
            departs = error > ROUNDING[dtype]
            causes = likely_causes(layer, inputs[0], mine, error) if departs else ()
            rows.append(Departure(path, type(layer).__name__, error, departs, causes))
            progress(rows[-1])

        return hook

    handles = {}
    for path, layer in torchs.named_modules():
        if isinstance(layer, COMPARED):
            handles[path] = layer.register_forward_hook(compare(path))
    with torch.no_grad():
        clip = torch.from_numpy(video).permute(0, 4, 1, 2, 3).to(DTYPES[dtype])
        torchs.decode(torchs.encode(clip).mode())
    return rows


def random_clip(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Draws a clip (1, T, H, W, 3) of random pixels in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (1, frames, height, width, 3))


def read_video(path: Path, frames: int, size: int, multiple: int) -> np.ndarray:
    """Reads the first frames of a clip, brought to `size` pixels on the short side."""
    info = probe(path)
    fitted = fit_size(info.height, info.width, multiple, size)
    return to_float(read_clip(path, fitted, frames))[None].astype(np.float64)


def report(rows: list[Departure]) -> str:
    """States the verdict in words."""
    departed = [row for row in rows if row.departs]
    if not departed:
        worst = max(rows, key=lambda row: row.error)
        return f"No layer departs: {len(rows)} compared, the largest difference is {worst.error:.1e} at {worst.path}."
    first = departed[0]
    causes = first.causes or ("none of the known mistakes reproduces it; compare the layer's code with torch_ref's",)
    return "\n".join(
        [
            f"The first layer that departs is {first.path} ({first.layer}): relative difference {first.error:.1e}.",
            f"Likely {'cause' if len(causes) == 1 else 'causes'}:",
            *(f"  - {cause}" for cause in causes),
            f"{len(departed)} of {len(rows)} layers depart on the input that torch gives them.",
        ]
    )


def main(
    checkpoint: Path,
    /,
    video: Path | None = None,
    frames: int = 9,
    size: int = 64,
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    seed: int = 0,
) -> int:
    """Compare flax_vae with torch_ref layer by layer, and name the first layer that departs, with likely causes.

    Args:
        checkpoint: directory in the public layout; `flax-vae port` makes one of any other checkpoint.
        video: clip whose first frames are run; without it, random pixels.
        frames: how many frames, 8k + 1.
        size: short side in pixels.
        dtype: precision of both; float64 shows even the smallest departure.
        seed: of the random pixels.
    """
    from rich.console import Console

    console = Console()

    def show(row: Departure) -> None:
        mark, style = ("departs", "bold red") if row.departs else ("equal", "green")
        console.print(f"{mark:8} {row.error:8.1e}  {row.path} ({row.layer})", style=style, highlight=False)

    with jax.enable_x64(True):
        ours = flax_vae.CausalVideoVAE.from_pretrained(checkpoint, dtype=dtype)
        multiple = ours.config.spatial_factor
        clip = read_video(video, frames, size, multiple) if video else random_clip(frames, size, size, seed)
        rows = compare_layers(ours, torch_ref.CausalVideoVAE.from_pretrained(checkpoint), clip, dtype, show)
    console.print(report(rows), highlight=False)
    return int(any(row.departs for row in rows))


if __name__ == "__main__":
    import tyro

    raise SystemExit(tyro.cli(main))
