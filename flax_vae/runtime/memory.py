"""Memory planning: the bytes that a stream takes, before it runs, and the largest chunk or batch within a budget.

B batch, T frames, H W pixels, C channels. Bytes are those of a device; on a CPU, of the whole process.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax

from flax_vae.runtime.stream import Compiled

UNITS = {"B": 1, **{f"{p}{b}": k**n for k, b in ((1000, "B"), (1024, "iB")) for n, p in enumerate("KMGT", 1)}}
HOST_MEMORY_SHARE = Fraction(1, 2)  # of a machine's memory: the page cache and other programs need some too
DEVICE_MEMORY_SHARE = Fraction(9, 10)  # of the allocator's limit: fragmentation leaves gaps that nothing fits

# What a process on a CPU takes beyond its arrays, measured by encoding and decoding at 64 to 256 pixels. Convolutions
# copy patches of their input: 10 to 40 % of all arrays. malloc keeps what is freed: up to 30 MiB a thread. Python and
# its packages take 220 MiB, compiling up to 320 MiB, the rest is for reading and writing video.
CPU_ARRAYS_FACTOR = Fraction(7, 5)
CPU_THREAD_BYTES = 32 * 2**20
CPU_PROCESS_BYTES = 704 * 2**20


def available_bytes() -> int:
    """Returns the default budget: a share of the memory installed, not of what is free, so that all runs have the same.

    On a CPU half of the machine's memory, or of its control group's limit where that is less (containers have one); on
    other devices nine tenths of what jax may allocate. Raises ValueError where neither is known.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return math.floor(HOST_MEMORY_SHARE * min([physical_bytes(), *cgroup_limits()]))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise ValueError(f"{device.device_kind} does not tell its memory: give a budget, as 4GiB")
    return math.floor(DEVICE_MEMORY_SHARE * limit)


def physical_bytes() -> int:
    """Returns the memory of this machine; ValueError where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        raise ValueError("the memory of this machine is not known: give a budget, as 4GiB") from None


def cgroup_limits(root: Path = Path("/")) -> Iterator[int]:
    """Yields the memory limits of the control groups of this process, versions 1 and 2, inner groups first.

    A container may see the path that its group has outside of it; its limit is then at the root of what is mounted.
    """
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            file = folder / name
            if folder.is_relative_to(top) and file.is_file() and (limit := file.read_text().strip()) != "max":
                yield int(limit)


def parse_bytes(text: str) -> int:
    """Parses a number of bytes, as 4GiB, 1.5 GB or 500000000; ValueError for anything else, and below one byte."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B?)", text.strip(), re.IGNORECASE | re.ASCII)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = math.floor(Fraction(match[1]) * units[match[2].lower() or "b"]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no amount of memory: expected a number and one of {', '.join(UNITS)}, as 4GiB")
    return size


def format_bytes(size: int) -> str:
    """Formats a number of bytes in the largest binary unit that it fills, to a tenth: 1.5 GiB."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if size >= UNITS[unit]), "B")
    return f"{round(size / UNITS[unit], 1):g} {unit}"


def step_bytes(step: Compiled, first: jax.ShapeDtypeStruct, later: jax.ShapeDtypeStruct | None = None) -> int:
    """Returns the bytes that a stream takes; compiles its step, but runs nothing and allocates no array.

    The program of a later chunk counts weights, chunk, carry, result and temporaries. Beside them a stream holds the
    result that was yielded last, the result and the carry of the chunk that is queued, and that chunk with its source.

    Args:
      step: of `flax_vae.runtime.stream.compiled`; it will run the program that is compiled here.
      first: shape and dtype of the first chunk (B, T, H, W, C).
      later: those of all others; None where the first is the only one, as of an image.

    Raises:
      ValueError: the first chunk is larger than a later one, or jax does not tell what a program takes.
    """
    if later is None:
        traced = step.trace(first, None)
        return process_bytes(program_bytes(traced) + tree_bytes(first))
    if math.prod(first.shape) > math.prod(later.shape):
        raise ValueError(f"the first chunk {first.shape} must not be larger than a later one {later.shape}")
    _, carry = step.trace(first, None).out_info
    traced = step.trace(later, carry)
    arrays = program_bytes(traced) + tree_bytes((traced.out_info[0], traced.out_info, later, later))
    return process_bytes(arrays)


def program_bytes(traced: jax.stages.Traced) -> int:
    """Compiles a program and returns its `compiled_bytes`."""
    return compiled_bytes(traced.lower().compile())


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of a program's arguments, results and temporaries; ValueError where jax does not tell them."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError(f"what a program takes is not known on {jax.default_backend()}: it cannot be planned for")
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return arrays - memory.alias_size_in_bytes


def process_bytes(arrays: int) -> int:
    """Returns the memory that computing with these bytes of arrays takes: on a CPU, that of the whole process."""
    if jax.default_backend() != "cpu":
        return arrays
    return math.ceil(CPU_ARRAYS_FACTOR * arrays) + CPU_PROCESS_BYTES + CPU_THREAD_BYTES * (os.cpu_count() or 1)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays, or shapes, of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest(bytes_of: Callable[[int], int], budget: int, limit: int) -> int:
    """Returns the largest power of two, `limit` at most, of which `bytes_of` is within the budget.

    `bytes_of`, which must not fall as its argument grows, compiles a program: it is called for the largest size first,
    which most often fits, then for 1, then where a line between what fits and what does not meets the budget.

    Raises ValueError where not even 1 fits, or for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1")
    over = 1 << (limit.bit_length() - 1)
    if (over_bytes := bytes_of(over)) <= budget:
        return over
    fits, fits_bytes = 1, over_bytes if over == 1 else bytes_of(1)
    if fits_bytes > budget:
        raise ValueError(
            f"{format_bytes(fits_bytes)} are needed for one latent at a time, and {format_bytes(budget)} may be used: "
            "allow more memory, compute frame by frame, make the frames smaller, or compute them in lossy tiles"
        )
    while over > 2 * fits:
        room = Fraction(budget - fits_bytes, over_bytes - fits_bytes) * (over - fits)
        guess = min(max(1 << (math.floor(fits + room).bit_length() - 1), 2 * fits), over // 2)
        if (size := bytes_of(guess)) <= budget:
            fits, fits_bytes = guess, size
        else:
            over, over_bytes = guess, size
    return fits
