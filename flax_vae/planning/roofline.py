"""The shortest time in which a chip can do what a compiled program asks for, by each of the things that it is made of.

Whatever else happens, a step takes at least as long as the longest of them: all products at the peak rate, all bytes
through memory, or all exchanges over links that are busy all the time. Real steps take longer.
"""

from __future__ import annotations

from flax_vae.planning.chips import Chip
from flax_vae.planning.hlo import Collective, Program


def seconds(program: Program, chip: Chip, devices: int) -> dict[str, float]:
    """Gives the seconds that a device needs for its flops, its memory, and its exchanges with `devices` in all."""
    sent = sum(count * sent_bytes(each, devices) for each, count in program.exchanges.items())
    return {
        "flops": program.flops / (chip.peak / chip.devices),
        "memory": program.bytes / (chip.memory_bandwidth / chip.devices),
        "interconnect": sent / (chip.interconnect / 2 / chip.devices),  # one way
    }


def sent_bytes(collective: Collective, devices: int) -> float:
    """Counts the bytes that each device sends, in the way that sends the fewest: around a ring."""
    size = collective.devices or devices
    share = (size - 1) / size
    factors = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": size - 1, "all-to-all": share}
    return collective.bytes * factors.get(collective.kind, 1)
