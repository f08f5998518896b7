"""Counts the FLOPs of the convolutions and matrix products of a compiled program."""

import math
import re
from functools import cache

import numpy as np

from flax_vae.planning.hlo_text import Computation, Instruction

WINDOW = re.compile(r"window=\{([^}]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def flops(instruction: Instruction, computation: Computation) -> int:
    """Returns 2 for each product that is summed: none for padding and for the holes of dilated inputs."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation.instructions[name].arrays[0].dims for name in instruction.operands[:2])
    result = instruction.arrays[0].dims
    if instruction.opcode == "dot":
        found = CONTRACTED.search(instruction.attributes)
        axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
        return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)
    labels = LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name}: a convolution without dim_labels")
    named = zip(labels.groups(), (left, right, result), strict=True)
    inputs, kernel, outputs = (dict(zip(names, sizes, strict=True)) for names, sizes in named)
    total = 2 * kernel["i"] * outputs["f"] * outputs["b"]
    for axis, window in enumerate(windows(instruction.attributes)):
        total *= products(inputs[str(axis)], outputs[str(axis)], *window)
    return total


def windows(attributes: str) -> list[tuple[int, ...]]:
    """Parses size, stride, low padding, input dilation and kernel dilation of each axis of a window."""
    found = WINDOW.search(attributes)
    values = dict(word.split("=") for word in found[1].split()) if found else {}
    axes = len(values["size"].split("x")) if values else 0
    columns = []
    for name, default in (("size", "1"), ("stride", "1"), ("pad", "0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")):
        entries = values[name].split("x") if name in values else [default] * axes
        columns.append([int(entry.split("_")[0]) for entry in entries])
    return list(zip(*columns, strict=True))


@cache
def products(inputs: int, outputs: int, size: int, stride: int, low: int, holes: int, dilation: int) -> int:
    """Counts along one axis the pairs of an output and a kernel entry that meet an input, not padding or a hole."""
    index = np.arange(outputs)[:, None] * stride + np.arange(size) * dilation - low  # outputs, size
    return int(((index >= 0) & (index <= (inputs - 1) * holes) & (index % holes == 0)).sum())
