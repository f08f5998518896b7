"""How XLA orders what a CPU computes."""

from __future__ import annotations

import os
from importlib.metadata import entry_points, version
from importlib.util import find_spec

ORDER = ("xla_cpu_enable_concurrency_optimized_scheduler", "false")
BARRIERS = ("xla_disable_hlo_passes", "cse_barrier_expander")
KNOWN_BEFORE = (0, 12)  # version of jaxlib; XLA ends the process where it does not know a flag


def order_for_memory() -> None:
    """Has XLA order a CPU's programs for the least memory, but for the flags that XLA_FLAGS gives already.

    To be called before jax computes anything. XLA by itself orders for many cores, and what two cores would wait for is
    computed long before it is needed. It also takes away the barriers that keep apart what a gradient computes a second
    time, and what is to be computed before something else: then all of it is kept. They stay where there is nothing but
    a CPU; a TPU cannot do without that pass.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    major, minor, *_ = version("jaxlib").split(".")
    if (int(major), int(minor)) < KNOWN_BEFORE:
        wanted = [ORDER, *([BARRIERS] if nothing_but_a_cpu() else [])]
        missing = [f"--{name}={value}" for name, value in wanted if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *missing])


def nothing_but_a_cpu() -> bool:
    """Tells, without importing jax, whether it will look for a CPU alone, or cannot find anything else."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen == "cpu"
    return not entry_points(group="jax_plugins") and not find_spec("jax_plugins") and not find_spec("libtpu")
