"""Meshes of devices by name and size, what they divide, and where arrays lie on them.

B batch, T frames, H W pixels, C channels; devices are divided over `data` (B), `time` (T), `height` and `width`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from flax_vae.models.config import VAEConfig

AXES = ("data", "time", "height", "width")
ALIASES = {"space": "height"}
KERNEL = re.compile(r"\bkernel\b")
MIN_SHARDED_VALUES = 2**16  # of a kernel; smaller ones are replicated, as gathering them would take longer


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "data=4,time=2" as sizes by axis; "space" is another word for height. ValueError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d{1,6})\s*", part)
        axis = ALIASES.get(found[1], found[1]) if found else ""
        if not found or axis not in AXES or axis in sizes or int(found[2]) < 1:
            raise ValueError(f"mesh {text!r}: expected each of {', '.join(AXES)} at most once, as data=4,height=2")
        sizes[axis] = int(found[2])
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of these sizes, 1 for an axis without one, over all devices there are, or over those given.

    Raises ValueError unless the sizes make as many as there are devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"a mesh has no axis {', '.join(sorted(unknown))}: expected {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if (count := math.prod(shape)) != len(devices):
        raise ValueError(
            f"the mesh {mesh_name(sizes)} has {count} devices, and there are {len(devices)}: expected sizes that make "
            f"{len(devices)}"
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def mesh_name(sizes: Mapping[str, int]) -> str:
    """Writes sizes as `parse_mesh` reads them."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def check_sizes(sizes: Mapping[str, int], config: VAEConfig, batch: int, frames: int, height: int, width: int) -> None:
    """Raises ValueError, with the sizes that would do, unless the mesh divides clips of this shape evenly.

    Each device gets as many clips, as many latents after the first, which is a chunk of its own, and as many rows and
    columns of latents. Images have no frames to divide, and every device of `time` computes them.
    """
    lengths = {
        "data": (batch, 1, "clips"),
        "time": (frames - 1, config.temporal_factor, "frames after the first"),
        "height": (height, config.spatial_factor, "rows"),
        "width": (width, config.spatial_factor, "columns"),
    }
    problems = []
    for axis, size in sizes.items():
        length, unit, what = lengths[axis]
        if size == 1 or length % (unit * size) == 0:
            continue
        fitting = max((n for n in range(1, size) if length % (unit * n) == 0), default=1)
        law = f"a multiple of {unit * size}"
        if axis == "time":
            law = f"clips of {unit * size}k + 1 frames, such as {unit * size + 1}"
        other = (
            f", or height={size} in its place"
            if axis == "time" and height % (config.spatial_factor * size) == 0
            else ""
        )
        problems.append(f"{length} {what} over {axis}={size}: expected {law}, or {axis}={fitting}{other}")
    if problems:
        raise ValueError(f"the mesh {mesh_name(sizes)} does not divide the work evenly:\n  " + "\n  ".join(problems))


def clip_spec(time_is_divided: bool) -> Spec:
    """Returns the axes over which a clip, or a part of one, is sharded; its first frame is replicated over `time`."""
    return Spec("data", "time" if time_is_divided else None, "height", "width", None)


def sharding(mesh: Mesh, spec: Spec | None = None) -> NamedSharding:
    """Returns the sharding of an array on the mesh; without a spec, it is replicated."""
    return NamedSharding(mesh, Spec() if spec is None else spec)


def weights_spec(path: Any, leaf: Any, devices: int) -> Spec:
    """Returns how a weight, or what an optimizer keeps of it, is sharded over the devices of `data` (FSDP).

    Kernels large enough are sharded over their output channels, otherwise over their input channels; the rest is
    replicated.
    """
    if devices == 1 or math.prod(leaf.shape) < MIN_SHARDED_VALUES or not KERNEL.search(jax.tree_util.keystr(path)):
        return Spec()
    axes = [axis for axis in (leaf.ndim - 1, leaf.ndim - 2) if leaf.shape[axis] % devices == 0]
    return Spec(*(("data" if axis == axes[0] else None) for axis in range(leaf.ndim))) if axes else Spec()
