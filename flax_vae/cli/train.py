"""`flax-vae train`."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from flax_vae.cli.options import NO_CLUSTER, Flag, Mesh, Processes, described, flag_help
from flax_vae.train.config import PRESETS, TrainConfig

Data = Annotated[
    Path,
    described(
        "FOLDER|MANIFEST|CLIP",
        'videos and images: a folder, with the folders in it, lines of {"video": path} or {"image": path}, or a clip',
    ),
]
Out = Annotated[
    Path, described("DIR", "folder of the run; where it holds a run of this very config, that is gone on with")
]
Preset = Annotated[
    Literal["tiny", "stage1", "stage2"],
    arg(
        help="what all other settings are by default. tiny: minutes on a CPU; stage1: the public recipe, clips of 17 "
        "frames of 256 x 256 and a tenth images; stage2: clips of 57 frames alone"
    ),
]
Fsdp = Annotated[
    Flag,
    flag_help(
        "with --mesh: the devices of data share the weights and the optimizer too, each keeping a part of them "
        "and sending it to the others when it is needed"
    ),
]


def with_preset(args: Sequence[str]) -> Callable[..., None]:
    """Returns the command with the defaults of the preset that the arguments name."""
    named = [after for before, after in pairwise(args) if before == "--preset"]
    named += [word.removeprefix("--preset=") for word in args if word.startswith("--preset=")]
    chosen: Any = named[-1] if named and named[-1] in PRESETS else "tiny"

    def train(
        data: Data,
        out: Out,
        preset: Preset = chosen,
        mesh: Mesh = None,
        fsdp: Fsdp = False,
        cluster: Processes = NO_CLUSTER,
        config: Annotated[TrainConfig, arg(name="")] = PRESETS[chosen],
    ) -> None:
        """Trains a VAE on videos and images, with the losses of the public recipe; stops and goes on at any moment.

        DIR gets config.json, metrics.jsonl (a line a step), checkpoints, pictures of what is lost (input,
        reconstruction, difference), broken.jsonl (what could not be read) and, at the end, report.png. The same command
        again goes on where the last checkpoint is, to the same numbers; SIGTERM and Ctrl-C save first. flax-vae export
        then writes the weights, averaged over the last steps, in the public layout.

        Example:
          flax-vae train --preset tiny --data clips --out my_run --steps 2000 --clips.size 64
        """
        from flax_vae.jobs.train import train

        train(config, data, out, mesh, fsdp, cluster)

    return train


train = with_preset(())
