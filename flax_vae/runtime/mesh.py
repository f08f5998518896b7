"""Meshes of devices by name and size, what they divide, and how arrays are sharded over them.

B batch, T frames, H W pixels, C channels; the axes of a mesh are `data` (B), `time` (T), `height` and `width`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from flax_vae.models.config import VAEConfig
from flax_vae.runtime.cluster import process

AXES = ("data", "time", "height", "width")
ALIASES = {"space": "height"}
KERNEL = re.compile(r"\bkernel\b")
MIN_SHARDED_VALUES = 2**16  # of a kernel; smaller ones are replicated, as an all-gather would take longer


def parse_mesh(text: str) -> dict[str, int]:
    """Parses "data=4,time=2" into sizes by axis; "space" is an alias of height. ValueError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d{1,6})\s*", part)
        axis = ALIASES.get(found[1], found[1]) if found else ""
        if not found or axis not in AXES or axis in sizes or int(found[2]) < 1:
            raise ValueError(f"mesh {text!r}: expected each of {', '.join(AXES)} at most once, as data=4,height=2")
        sizes[axis] = int(found[2])
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of these sizes, 1 for an axis without one, over all devices or over those given.

    Raises ValueError unless the product of the sizes is the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"a mesh has no axis {', '.join(sorted(unknown))}: expected {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if (count := math.prod(shape)) != len(devices):
        made = f"the mesh {mesh_name(sizes)} has {count} devices, and there are {len(devices)}"
        raise ValueError(f"{made}: expected sizes that make {len(devices)}")
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def mesh_name(sizes: Mapping[str, int]) -> str:
    """Writes sizes as `parse_mesh` reads them."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def check_sizes(sizes: Mapping[str, int], config: VAEConfig, batch: int, frames: int, height: int, width: int) -> None:
    """Checks that a mesh divides clips evenly: into whole clips, latents after the first, and rows and columns of them.

    Images have no frames to divide: each device of `time` computes them.

    Args:
      sizes: of the mesh, by axis.
      config: of the model.
      batch, frames, height, width: of the clips, in pixels.

    Raises:
      ValueError: the mesh does not divide them; it names sizes that would do.
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
        law, other = f"a multiple of {unit * size}", ""
        if axis == "time":
            law = f"clips of {unit * size}k + 1 frames, such as {unit * size + 1}"
            other = f", or height={size} in its place" * (height % (config.spatial_factor * size) == 0)
        problems.append(f"{length} {what} over {axis}={size}: expected {law}, or {axis}={fitting}{other}")
    if problems:
        raise ValueError(f"the mesh {mesh_name(sizes)} does not divide the work evenly:\n  " + "\n  ".join(problems))


def clip_spec(over_time: bool) -> Spec:
    """Returns the spec of a part (B, T, H, W, C) of a clip; the first frame is replicated over `time`."""
    return Spec("data", "time" if over_time else None, "height", "width", None)


def sharding(mesh: Mesh, spec: Spec | None = None) -> NamedSharding:
    """Returns the sharding of an array on the mesh: that of the spec, or replicated without one."""
    return NamedSharding(mesh, Spec() if spec is None else spec)


def weights_spec(path: Any, leaf: Any, devices: int) -> Spec:
    """Returns the spec of a weight, or of its optimizer state, sharded over the devices of `data` (FSDP).

    Kernels large enough are sharded over their output channels where the devices divide these, otherwise over their
    input channels. Everything else is replicated.
    """
    if devices == 1 or math.prod(leaf.shape) < MIN_SHARDED_VALUES or not KERNEL.search(jax.tree_util.keystr(path)):
        return Spec()
    axes = [axis for axis in (leaf.ndim - 1, leaf.ndim - 2) if leaf.shape[axis] % devices == 0]
    return Spec(*(("data" if axis == axes[0] else None) for axis in range(leaf.ndim))) if axes else Spec()


def process_share(mesh: Mesh | None) -> tuple[int, int]:
    """Returns (k, N) where this process holds the k-th of N equal parts of the clips of a batch, counted from 0.

    Raises ValueError where a clip lies on devices of several processes, or several processes have no mesh.
    """
    number, processes = process()
    if processes == 1:
        return 0, 1
    if mesh is None:
        raise ValueError(f"{processes} processes train one model on a mesh of all their devices, as data={processes}")
    owners = [{device.process_index for device in devices.flat} for devices in mesh.devices]  # by index of `data`
    rows = [row for row, owner in enumerate(owners) if number in owner]
    each, rest = divmod(len(owners), processes)
    if rest or any(len(owner) > 1 for owner in owners) or rows != list(range(rows[0], rows[0] + each)):
        crossing = f"the mesh {dict(mesh.shape)} has clips cross from one of {processes} processes to another"
        raise ValueError(f"{crossing}: expected data={processes}, or a multiple of it")
    return rows[0] // each, processes
