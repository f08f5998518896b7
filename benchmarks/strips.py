"""What cutting frames into strips saves on a TPU: python -m benchmarks.strips

Compiles tasks of the released model for one v5e that need not be there, in strips and as XLA does it, in bfloat16.
Prints what each takes as the compiler plans it, beside a floor: the bytes when each convolution and product of matrices
reads its operands once and writes its result once, and all between them costs nothing. Minutes for each program.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any, get_args

from benchmarks.convolutions import equations
from benchmarks.speed import Row, Task
from benchmarks.subjects import Preset, memory_of
from flax_vae.planning.chips import parse_topology
from flax_vae.planning.compile_ahead import TPU
from flax_vae.planning.describe import amount, duration, scaled

CHIP = "v5e:1x1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=get_args(Preset), default="full", help="model (default: full)")
    parser.add_argument("--jobs", nargs="+", choices=get_args(Task), default=["encode", "decode"], help="tasks")
    parser.add_argument("--frames", type=int, default=17, help="8k + 1 frames of the clip (default: 17)")
    parser.add_argument("--size", type=int, default=256, help="its height and width (default: 256)")
    args = parser.parse_args()
    os.environ.update(TPU)
    print("| | temporaries | bytes | flops | by bytes | by flops |\n|---|---:|---:|---:|---:|---:|")
    for job in args.jobs:
        for line in lines(Row(args.preset, "bfloat16", job, args.frames, args.size)):
            print(line, flush=True)


def lines(row: Row) -> Iterator[str]:
    """Yields rows of a Markdown table: XLA's way, strips, and the floor."""
    import jax

    from benchmarks.worker import flops_of
    from flax_vae.layers.strips import shared_by_tpus
    from flax_vae.ops.window import lowered
    from flax_vae.planning.hlo import program
    from flax_vae.planning.worker import devices_of

    topology = parse_topology(CHIP)
    function, arguments = lowerable(row, devices_of(topology)[0])
    for way, devices in (("XLA's way", 0), ("strips", 1)):
        with shared_by_tpus(devices):
            compiled = jax.jit(function).lower(*arguments).compile()
        found = program(compiled.as_text() or "")
        temporaries = memory_of(compiled).temp_size_in_bytes
        yield line(f"{row.name}, {way}", amount(temporaries), found.bytes, found.flops, topology.chip)
    with lowered("plain"):
        traced = jax.make_jaxpr(function)(*arguments)
    yield line(f"{row.name}, floor", "-", operand_bytes(traced.jaxpr), flops_of(row), topology.chip)


def line(name: str, temporaries: str, moved: int, flops: float, chip: Any) -> str:
    """Returns a row of the table; times are at the chip's full bandwidth, and at its peak rate."""
    times = duration(moved / chip.memory_bandwidth), duration(flops / chip.peak)
    return f"| {' | '.join([name, temporaries, amount(moved), scaled(flops), *times])} |"


def lowerable(row: Row, device: Any) -> tuple[Any, list[Any]]:
    """Returns a task as a function, and what it is traced with: shapes on a device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from benchmarks.tasks import abstract_task

    def on_device(leaf):
        dtype = jnp.bfloat16 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=SingleDeviceSharding(device))

    function, state, inputs = abstract_task(row)
    return function, jax.tree.map(on_device, [state, *inputs])


def operand_bytes(jaxpr: Any) -> int:
    """Adds up the bytes of operands and results of convolutions and products of matrices; a loop's count each turn."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            arrays = [each.aval for each in (*equation.invars, *equation.outvars)]
            total += times * sum(array.size * array.dtype.itemsize for array in arrays)
    return total


if __name__ == "__main__":
    main()
