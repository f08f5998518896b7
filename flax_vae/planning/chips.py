"""The TPUs that a program can be compiled for ahead of time, and the figures of their chips."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
DOCS = "https://docs.cloud.google.com/tpu/docs"


@dataclass(frozen=True)
class Chip:
    """One generation of TPU; figures are of a chip."""

    name: str
    memory: float  # bytes of HBM that libtpu 0.0.42 lets a program use, by its message when it refuses one
    memory_bandwidth: float  # bytes/s
    peak: float  # FLOPs/s in bfloat16, in which float32 is multiplied too unless jax is asked for more precision
    interconnect: float  # bytes/s between chips, both directions and all links together
    axes: int  # of a slice: 2x2, or 2x2x1
    example: str
    source: str
    devices: int = 1  # that jax sees on a chip
    runtime_name: str = ""  # libtpu's, where it is another one
    options: dict[str, Any] = field(default_factory=dict)  # of libtpu


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", 30.75 * GIB, 1.2e12, 275e12, 600e9, 3, "v4:2x2x1"),
            source=f"{DOCS}/v4; 6 links of 50 GB/s each way: https://arxiv.org/abs/2304.01433",
            options={"chip_config_name": "megacore"},  # without it each of the two cores is a device
        ),
        Chip("v5e", 15.75 * GIB, 819e9, 197e12, 400e9, 2, "v5e:4x4", f"{DOCS}/v5e"),
        Chip("v5p", 95.74 * GIB, 2.765e12, 459e12, 1.2e12, 3, "v5p:2x2x2", f"{DOCS}/v5p"),
        Chip("v6e", 31.25 * GIB, 1.638e12, 918e12, 800e9, 2, "v6e:4x4", f"{DOCS}/v6e"),
        Chip(
            *("v7x", 2 * 94.75 * GIB, 7.38e12, 2.307e15, 1.2e12, 3, "v7x:2x2x1"),
            source=f"{DOCS}/tpu7x",
            devices=2,
            runtime_name="tpu7x",
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for: a slice of TPUs, as v5e:4x4, virtual ones, as cpu:8, or the GPUs of this machine."""

    name: str
    platform: str  # tpu, cpu or gpu
    chip: Chip | None = None
    shape: tuple[int, ...] = ()

    @property
    def devices(self) -> int | None:
        """The number of devices that jax will see; None for GPUs, which only jax can count."""
        return math.prod(self.shape) * (self.chip.devices if self.chip else 1) if self.shape else None

    @property
    def runtime_name(self) -> str:
        """The name of the slice in libtpu."""
        assert self.chip is not None
        return f"{self.chip.runtime_name or self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def options(self) -> dict[str, Any]:
        """The options of libtpu beside the name."""
        assert self.chip is not None
        alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(self.shape) == 1 else {}
        return {**self.chip.options, **alone}


def parse_topology(text: str) -> Topology:
    """Parses v5e:4x4, v5p:2x2x2, cpu:8 or gpu; ValueError lists examples."""
    if text == "gpu":
        return Topology(text, "gpu")
    if (found := re.fullmatch(r"cpu:([1-9]\d*)", text, re.ASCII)) is not None:
        return Topology(text, "cpu", shape=(int(found[1]),))
    name, _, sizes = text.partition(":")
    chip = CHIPS.get({"tpu7x": "v7x", "ironwood": "v7x", "v5litepod": "v5e"}.get(name, name))
    if chip is None:
        examples = ", ".join(each.example for each in CHIPS.values())
        raise ValueError(f"--topology {text}: no such devices; expected one as {examples}, cpu:8, or gpu")
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{chip.axes - 1}}}", sizes, re.ASCII):
        raise ValueError(f"--topology {text}: a slice of {chip.name} has {chip.axes} sides, as {chip.example}")
    shape = tuple(int(side) for side in sizes.split("x"))
    if math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2):
        raise ValueError(f"--topology {text}: hosts have 2x2 chips, so both sides must be even, or all of them 1")
    return Topology(f"{chip.name}:{sizes}", "tpu", chip, shape)
