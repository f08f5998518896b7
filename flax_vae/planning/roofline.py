"""Roofline: lower bounds on run time from FLOPs, memory traffic and communication.

A program takes at least the longest of three times: all products at the peak rate, all bytes at the memory bandwidth,
all collectives over links that are never idle. Real programs take longer.
"""

from flax_vae.planning.chips import Chip
from flax_vae.planning.hlo import Collective, Program


def seconds(program: Program, chip: Chip, devices: int) -> dict[str, float]:
    """Returns the lower bounds of a program on one of `devices` devices, by resource."""
    sent = sum(count * sent_bytes(each, devices) for each, count in program.exchanges.items())
    return {
        "flops": program.flops / (chip.peak / chip.devices),
        "memory": program.bytes / (chip.memory_bandwidth / chip.devices),
        "interconnect": sent / (chip.interconnect / 2 / chip.devices),  # one way
    }


def sent_bytes(collective: Collective, devices: int) -> float:
    """Returns the bytes that each device sends by the ring algorithm, which sends the fewest."""
    size = collective.devices or devices
    share = (size - 1) / size
    factors = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": size - 1, "all-to-all": share}
    return collective.bytes * factors.get(collective.kind, 1)
