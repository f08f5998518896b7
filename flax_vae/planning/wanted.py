"""What `flax-vae plan` is asked for, and the request that it makes; importable without jax."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from flax_vae.io.pixels import parse_size
from flax_vae.planning.chips import parse_topology
from flax_vae.planning.request import Request
from flax_vae.train.config import PRESETS, Precision, check

MESH_HELP = "how many devices divide what: data (clips), time, height, width, as data=8,height=2"
PRECISION_DEFAULT = "the preset's; float32 to encode and decode"


def of_preset(metavar: str | None, help: str, default: str = "the preset's") -> Any:
    """Describes an option whose default is not its value."""
    return arg(metavar=metavar, help=help, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Wanted:
    """A program, and the devices to compile it for."""

    topology: Annotated[str, arg(metavar="NAME")]
    """devices: a slice of TPUs, which need not be there (v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:4x4, v7x:2x2x1); cpu:8,
    virtual ones; gpu, those of this machine"""
    job: Positional[Literal["train", "encode", "decode"]] = "train"
    """a step of training, or a batch of clips"""
    preset: Literal["tiny", "stage1", "stage2"] = "stage1"
    """of flax-vae train: all that is not given here, and for training the losses"""
    model: Annotated[str | None, of_preset("NAME", "preset of the model, as pyramid-flow")] = None
    batch: Annotated[int | None, of_preset("N", "clips, of all devices together")] = None
    frames: Annotated[int | None, of_preset("N", "frames of a clip")] = None
    size: Annotated[str | None, of_preset("SIDE|HxW", "pixels, as 256 or 720x1280")] = None
    mesh: Annotated[str | None, of_preset("SIZES", MESH_HELP, "data=all")] = None
    chunk: Annotated[int | None, of_preset("N", "frames at a time, whole latents", "all at once")] = None
    remat: bool = True
    """for training: compute activations a second time, in less memory"""
    frame_by_frame: bool = False
    """compute each block one frame after the other, in less memory"""
    fsdp: bool = False
    """for training: the devices of data share the weights and the optimizer too"""
    precision: Annotated[Precision | None, of_preset(None, "what is computed in", PRECISION_DEFAULT)] = None


def request_of(wanted: Wanted) -> Request:
    """Completes what is asked for from its preset, but for the mesh; ValueError for what no program can have."""
    from flax_vae.families import registry

    base, is_training = PRESETS[wanted.preset], wanted.job == "train"
    sides = parse_size(wanted.size) or base.clips.size
    height, width = sides if isinstance(sides, tuple) else (sides, sides)
    given = {"batch": wanted.batch, "frames": wanted.frames}
    clips = replace(base.clips, **{name: value for name, value in given.items() if value is not None})
    model = wanted.model or base.model
    for side in (height, width):
        check(replace(base, chunk=wanted.chunk, clips=replace(clips, size=side)), registry.preset(model))
    return Request(
        topology=parse_topology(wanted.topology).name,
        job=wanted.job,
        model=model,
        batch=clips.batch,
        frames=clips.frames,
        height=height,
        width=width,
        mesh={},
        precision=wanted.precision or (base.precision if is_training else "float32"),
        preset=wanted.preset,
        chunk=wanted.chunk,
        remat=is_training and wanted.remat,
        frame_by_frame=wanted.frame_by_frame,
        fsdp=is_training and wanted.fsdp,
    )


def with_mesh(request: Request, text: str | None) -> Request:
    """Completes a request with its mesh, by default all devices for the clips; ValueError where that cannot be."""
    from flax_vae.families import registry
    from flax_vae.runtime.mesh import check_sizes, parse_mesh

    count = parse_topology(request.topology).devices
    sizes = parse_mesh(text) if text else {"data": count or 1}
    if count is not None and (made := math.prod(sizes.values())) != count:
        raise ValueError(f"--mesh {text} has {made} devices, and {request.topology} has {count}: expected as many")
    check_sizes(sizes, registry.preset(request.model), request.batch, request.frames, request.height, request.width)
    return replace(request, mesh=sizes)
