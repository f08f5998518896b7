"""Counts the multiplications and additions of the convolutions and matrix products of a compiled program."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np

from flax_vae.planning.hlo_text import Computation, Instruction

WINDOW = re.compile(r"window=\{([^}]*)\}")
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def flops(instruction: Instruction, computation: Computation) -> int:
    """Gives 2 for each product that is summed up: those of padding and of holes between inputs are none."""
    if instruction.opcode == "dot":
        return dot_flops(instruction, computation)
    if instruction.opcode == "convolution":
        return convolution_flops(instruction, computation)
    return 0


def dot_flops(instruction: Instruction, computation: Computation) -> int:
    left = dims_of(instruction, computation, 0)
    found = CONTRACTED.search(instruction.attributes)
    axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2 * math.prod(instruction.arrays[0].dims) * math.prod(left[axis] for axis in axes)


def convolution_flops(instruction: Instruction, computation: Computation) -> int:
    labels = LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name}: a convolution without dim_labels")
    dims = dims_of(instruction, computation, 0), dims_of(instruction, computation, 1), instruction.arrays[0].dims
    named = zip(labels.groups(), dims, strict=True)
    inputs, kernel, outputs = (dict(zip(names, sizes, strict=True)) for names, sizes in named)
    total = 2 * kernel["i"] * outputs["f"] * outputs["b"]
    for axis, window in enumerate(windows(instruction.attributes)):
        total *= products(inputs[str(axis)], outputs[str(axis)], *window)
    return total


def dims_of(instruction: Instruction, computation: Computation, operand: int) -> tuple[int, ...]:
    return computation.instructions[instruction.operands[operand]].arrays[0].dims


def windows(attributes: str) -> list[tuple[int, int, int, int, int]]:
    """Reads size, stride, low padding, and dilation of inputs and of the kernel, of each axis of a window."""
    found = WINDOW.search(attributes)
    values = dict(word.split("=") for word in found[1].split()) if found else {}
    axes = len(values["size"].split("x")) if values else 0

    def numbers(name: str, usual: str) -> list[int]:
        return [int(entry.split("_")[0]) for entry in values.get(name, "x".join([usual] * axes)).split("x")]

    names = ("size", "1"), ("stride", "1"), ("pad", "0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
    return list(zip(*(numbers(*name) for name in names), strict=True)) if axes else []


@cache
def products(inputs: int, outputs: int, size: int, stride: int, low: int, holes: int, dilation: int) -> int:
    """Counts along one axis the pairs of an output and a kernel entry that meet a real input."""
    places = np.arange(outputs)[:, None] * stride + np.arange(size) * dilation - low
    return int(((places >= 0) & (places <= (inputs - 1) * holes) & (places % holes == 0)).sum())
