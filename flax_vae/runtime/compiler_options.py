"""Flags by which XLA schedules a CPU's programs for memory."""

import os
from importlib.metadata import entry_points, version
from importlib.util import find_spec

SCHEDULER_FLAG = ("xla_cpu_enable_concurrency_optimized_scheduler", "false")
BARRIER_FLAG = ("xla_disable_hlo_passes", "cse_barrier_expander")
MAX_JAXLIB = (0, 12)  # whose XLA may not know these flags any more; it ends the process at an unknown one


def order_for_memory() -> None:
    """Has XLA schedule a CPU's programs for the least memory, except where XLA_FLAGS already names a flag.

    To be called before jax computes anything. By default XLA schedules for many cores, and computes long before it is
    needed what two cores then keep waiting. Its pass cse_barrier_expander also removes the barriers that keep apart
    what a gradient recomputes, so that all of it is kept: the pass is disabled where there is nothing but a CPU. A TPU
    cannot do without it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    major, minor, *_ = version("jaxlib").split(".")
    if (int(major), int(minor)) < MAX_JAXLIB:
        wanted = [SCHEDULER_FLAG, *([BARRIER_FLAG] if only_cpu() else [])]
        missing = [f"--{name}={value}" for name, value in wanted if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *missing])


def only_cpu() -> bool:
    """Whether jax, which is not imported for it, will look for a CPU alone, or can find nothing else."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen == "cpu"
    return not entry_points(group="jax_plugins") and not find_spec("jax_plugins") and not find_spec("libtpu")
