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
    if instruction.opcode == "dot":
        return dot_flops(instruction, computation)
    if instruction.opcode == "convolution":
        return convolution_flops(instruction, computation)
    return 0


def dot_flops(instruction: Instruction, computation: Computation) -> int:
    left, _ = operand_dims(instruction, computation)
    found = CONTRACTED.search(instruction.attributes)
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2 * math.prod(instruction.arrays[0].dims) * math.prod(left[axis] for axis in axes)


def convolution_flops(instruction: Instruction, computation: Computation) -> int:
    labels = LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name}: a convolution without dim_labels")
    dims = *operand_dims(instruction, computation), instruction.arrays[0].dims
    named = zip(labels.groups(), dims, strict=True)
    inputs, kernel, outputs = (dict(zip(names, sizes, strict=True)) for names, sizes in named)
    total = 2 * kernel["i"] * outputs["f"] * outputs["b"]
    for axis, window in enumerate(windows(instruction.attributes)):
        total *= products(inputs[str(axis)], outputs[str(axis)], *window)
    return total


def operand_dims(instruction: Instruction, computation: Computation) -> list[tuple[int, ...]]:
    return [computation.instructions[name].arrays[0].dims for name in instruction.operands[:2]]


def windows(attributes: str) -> list[tuple[int, ...]]:
    """Parses size, stride, low padding, input dilation and kernel dilation of each axis of a window."""
    found = WINDOW.search(attributes)
    if not found:
        return []
    values = dict(word.split("=") for word in found[1].split())
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
