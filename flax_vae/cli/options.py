"""Arguments that several commands share, with their help."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

_CHECKPOINT = (
    "checkpoint: a folder with config.json and *.safetensors (also sharded), .bin, .pt or .pth, "
    "one such file beside its config.json, or a hub name owner/name"
)
Checkpoint = Annotated[str, Positional, arg(metavar="CKPT", help=_CHECKPOINT)]
Weights = Annotated[str, arg(metavar="CKPT", help=_CHECKPOINT)]
Video = Annotated[Path, Positional, arg(metavar="VIDEO", help="clip to read; an image is a clip of one frame")]
Clip = Annotated[
    Path, Positional, arg(metavar="OUT.mp4", help="clip to write (.mp4, .mkv, .mov); replaced if it exists")
]
Config = Annotated[
    Path | None,
    arg(metavar="FILE", help="config.json to use", help_behavior_hint="(default: the one beside the weights)"),
]
Size = Annotated[
    str | None,
    arg(
        metavar="SHORT|HxW",
        help="size in pixels: the short side, as 256, or height x width, as 288x512; the clip is scaled to cover it, "
        "and its centre cropped to multiples of the model's spatial factor (8 as released)",
        help_behavior_hint="(default: the clip's own size, or short side 256 if that is less)",
    ),
]
Frames = Annotated[
    int | None,
    arg(metavar="N", help="read at most this many frames", help_behavior_hint="(default: all)"),
]
