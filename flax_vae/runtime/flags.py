"""How XLA orders what a CPU computes."""

from __future__ import annotations

import os
from importlib.metadata import version

FOR_MANY_CORES = "xla_cpu_enable_concurrency_optimized_scheduler"
KNOWN_BEFORE = (0, 12)  # version of jaxlib; XLA ends the process where it does not know a flag


def order_for_memory() -> None:
    """Has XLA order a CPU's programs for the least memory, unless XLA_FLAGS says otherwise.

    To be called before jax computes anything. XLA by itself orders for many cores, and what two cores would wait for is
    computed long before it is needed: decoding nine frames with the released model then takes five times the memory.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    major, minor, *_ = version("jaxlib").split(".")
    if FOR_MANY_CORES not in flags and (int(major), int(minor)) < KNOWN_BEFORE:
        os.environ["XLA_FLAGS"] = f"{flags} --{FOR_MANY_CORES}=false".strip()
