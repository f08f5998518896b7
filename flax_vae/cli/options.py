"""Arguments that several commands share, with their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

from flax_vae.jobs.options import Options
from flax_vae.runtime.cluster import Cluster

T = TypeVar("T")
Hidden = Annotated[T, Fixed, Suppress]  # an option that a command does not take
Flag = Annotated[bool, FlagCreatePairsOff]
CHECKPOINT = (
    "checkpoint: a folder with config.json and *.safetensors (also sharded), .bin, .pt or .pth, "
    "one such file beside its config.json, a hub name owner/name, or default, a small model in this package"
)


def described(metavar: str | None, help: str, default: str | None = None) -> Any:
    """Describes an argument; `default` is what --help says where that is not the value."""
    return arg(metavar=metavar, help=help, help_behavior_hint=default and f"(default: {default})")


def flag_help(help: str, **settings: Any) -> Any:
    """Describes a `Flag`, without its default, which is always off."""
    return arg(help=help, help_behavior_hint="", **settings)


Checkpoint = Annotated[Positional[str], described("CKPT", CHECKPOINT)]
Weights = Annotated[str, described("CKPT", CHECKPOINT)]
Video = Annotated[
    Positional[Path],
    described("VIDEO", "clip to read; an image is a clip of one frame; or a folder of images, each a clip"),
]
Clip = Annotated[
    Positional[Path],
    described(
        "OUT.mp4",
        "clip to write (.mp4, .mkv, .mov), replaced if it exists; of an image also .png, of a folder a folder",
    ),
]
Config = Annotated[Path | None, described("FILE", "config.json to use", "the one beside the weights")]
Mesh = Annotated[
    str | None,
    described(
        "AXIS=N,...",
        "devices that share the work, by what they divide: data (clips of a batch), time, height (or space), width; as "
        "data=4,height=2; docs/scaling.md says which to take",
        "one device",
    ),
]
Processes = Annotated[Cluster, FlagCreatePairsOff, arg(name="")]
NO_CLUSTER = Cluster()


@dataclass(frozen=True)
class CodingOptions(Options):
    """The options of a job, each with its help."""

    size: Annotated[
        str | None,
        described(
            "SHORT|HxW",
            "size in pixels: the short side, as 256, or height x width, as 288x512; the clip is scaled to cover it, "
            "and its centre cropped to multiples of the model's spatial factor (8 as released)",
            "the clip's own size, or short side 256 if that is less",
        ),
    ] = None
    frames: Annotated[int | None, described("N", "read at most this many frames", "all")] = None
    memory: Annotated[
        str | None,
        described(
            "SIZE",
            "memory to stay within, as 4GiB; it decides how many frames are computed at a time, before any is",
            "a share of the device's",
        ),
    ] = None
    mesh: Mesh = None
    precision: Annotated[
        Literal["float32", "bfloat16"],
        arg(help="what weights and frames are computed in; bfloat16 takes half the memory, and rounds to three digits"),
    ] = "float32"
    frame_by_frame: Annotated[
        Flag,
        flag_help(
            "compute each block one frame after the other: the same results in less memory, for frames so large that "
            "those of one latent do not fit"
        ),
    ] = False
    lossy_tiles: Annotated[
        Flag,
        flag_help(
            "compute frames in tiles of 256 x 256 pixels, blended: takes less memory for large frames, and changes "
            "what comes out, often visibly; chunks of fewer frames (--memory) change nothing"
        ),
    ] = False
    resume: Annotated[
        Flag,
        flag_help(
            "go on with what the same command has done before it was stopped; the result is the same to the last byte"
        ),
    ] = False


Coding = Annotated[CodingOptions, arg(name="")]
CODING = CodingOptions()
