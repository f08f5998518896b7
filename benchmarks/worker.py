"""A process that `python -m benchmarks` starts, to do a task in one way; it answers in lines of JSON.

A process has its own threads, which are in no other's way, and its own peak of memory. This one makes a task ready,
calls it, and says what that took; then it calls it for every line that it reads, and says the seconds. So it does with
the convolution that a line names. Asked for the rate of matmuls, or for the flops of tasks, it answers once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.convolutions import Convolution, ready_part
from benchmarks.peak import loaded_bytes, peak_above, status
from benchmarks.speed import OURS, PLAIN, Device, Measured, Precision, Row
from benchmarks.subjects import random_values
from benchmarks.tasks import Ready, abstract_task, flax_ready, set_up_jax, set_up_torch, torch_ready
from flax_vae.runtime.compiler_options import order_for_memory

SQUARE = {"cpu": 2048, "gpu": 8192}  # rows of the matrices that the rate is measured with
PRODUCTS = 20
MIN_TIMED_SECONDS = 0.1  # for which a convolution is called


def main(request: str) -> None:
    """Answers a request, and then each line; an error is an answer too, and the last."""
    order_for_memory()  # as the commands do
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        for answer in answers_to(**json.loads(request)):
            answers.write(json.dumps(answer) + "\n")
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        answers.write(json.dumps({"error": f"{type(error).__name__}: {first}"}) + "\n")


def answers_to(kind: str, name: str, device: Device, **asked: Any) -> Iterator[Measured]:
    """Yields the matmul "rate", the "flops" of rows, or seconds of calls: of "convolutions", or of a "task".

    Of a task, what making it ready took comes first.
    """
    if kind == "rate":
        yield matmul_rate(name, device, asked["precision"])
    elif kind == "flops":
        yield {"flops": [flops_of(Row(**row)) for row in asked["rows"]]}
    elif kind == "convolutions":
        yield from convolution_calls(name, device, asked["precision"], map(Convolution.read, asked[kind]))
    else:
        yield from calls(name, device, Row(**asked["row"]), asked["free"])


def calls(way: str, device: Device, row: Row, free: int | None) -> Iterator[Measured]:
    """Prepares a task in a way, calls it twice, and then once for each line of standard input."""
    if free is not None:  # what takes more gets an error, where the system would kill a process of its choice
        limit = free + status("/proc/self/status", "VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    ready = ready_to(way, device, row, free)
    took = {"load": time.perf_counter() - start - sum(ready.seconds.values()), **ready.seconds}
    results: list[Any] = []
    took["first"] = timed(lambda: results.extend(ready.call()))
    found = outcome(row, [ready.read(result) for result in results])
    results.clear()
    yield {"took": took, "outcome": found, "memory": memory_of(ready, device)}
    for _ in sys.stdin:
        yield {"seconds": timed(ready.call)}


def convolution_calls(
    way: str, device: Device, precision: Precision, convolutions: Iterable[Convolution]
) -> Iterator[Measured]:
    """Times, for each line of standard input, the convolution of this index, or one of its gradients, in many calls.

    One call would be too short: threads that have slept take milliseconds to start.
    """
    known = list(convolutions)
    ready: tuple[Any, Callable[[], Any]] = (None, lambda: None)
    for text in sys.stdin:
        index, part = asked = json.loads(text)
        if asked != ready[0]:
            ready = asked, ready_part(way, known[index], part, device, precision)
        calls, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < MIN_TIMED_SECONDS:
            ready[1]()
            calls += 1
        yield {"seconds": taken / calls}


def ready_to(way: str, device: Device, row: Row, free: int | None) -> Ready:
    """Prepares a task in the way of this name."""
    if way in (OURS, PLAIN):
        return flax_ready(row, device, way == PLAIN, free)
    return torch_ready(row, device, "compile" in way, "channels_last_3d" in way)


def outcome(row: Row, arrays: list[np.ndarray]) -> list[list[int]]:
    """Returns the shapes of clips, or the count of a gradient's or step's values; ValueError for any not finite."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("gives values that are not finite")
    if row.task in ("encode", "decode"):
        return [list(array.shape) for array in arrays]
    return [[sum(array.size for array in arrays)]]


def memory_of(ready: Ready, device: Device) -> dict[str, int]:
    """Returns the peak bytes of a call above what is held without it, and of the process; on a gpu, of its memory.

    On a gpu jax cannot reset a peak, so what a call takes is what the compiler tells.
    """
    if device == "cpu":
        return host_memory(ready.call)
    if ready.above is not None:
        import jax

        told = jax.local_devices()[0].memory_stats() or {}
        return {"above": ready.above, "process": told["peak_bytes_in_use"]}
    import torch

    before, loaded = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ready.call()
    peak = torch.cuda.max_memory_allocated()
    return {"above": peak - loaded, "process": max(before, peak)}


def host_memory(call: Callable[[], Any]) -> dict[str, int]:
    """Returns the same for the memory of the machine."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed would hide a part of what the call takes
    before = status("/proc/self/status", "VmHWM")
    loaded = loaded_bytes()
    call()
    row = peak_above(loaded)
    return {"above": row["above"], "process": max(before, row["peak"])}


def matmul_rate(name: str, device: Device, precision: Precision) -> Measured:
    """Returns the most flops per second that a framework reaches in the product of two large square matrices."""
    n = SQUARE[device]
    values = random_values(np.random.default_rng(0), (n, n))
    if name == OURS:
        import jax
        import jax.numpy as jnp

        x = jnp.asarray(values, set_up_jax(device, precision))
        product = jax.jit(jnp.matmul)
        best = min(timed(lambda: product(x, x).block_until_ready()) for _ in range(PRODUCTS))
        return {"rate": 2 * n**3 / best, "device": jax.local_devices()[0].device_kind}
    import torch

    y = torch.from_numpy(values).to(**set_up_torch(device, precision))

    def multiply():
        torch.mm(y, y)
        if device == "gpu":
            torch.cuda.synchronize()

    return {"rate": 2 * n**3 / min(timed(multiply) for _ in range(PRODUCTS))}


def flops_of(row: Row) -> float:
    """Counts the flops of a task as XLA does, of the program with XLA's own convolutions; nothing is compiled.

    Products with the zeros around a clip are none.
    """
    import jax

    from flax_vae.ops.window import lowered

    function, state, inputs = abstract_task(row)
    with lowered("plain"):
        analysis: Any = jax.jit(function).lower(state, *inputs).cost_analysis()
    return analysis["flops"]


def timed(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1])
