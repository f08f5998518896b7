"""A program that is asked for, and the report of what it takes once it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A program that is asked for."""

    topology: str
    job: str  # train, encode or decode
    model: str
    batch: int
    frames: int
    height: int
    width: int
    mesh: dict[str, int]
    precision: str
    preset: str = "stage1"  # of the training run
    chunk: int | None = None
    remat: bool = False
    frame_by_frame: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class Report:
    """What a program takes on each device; None for what is not known of these devices."""

    request: Request
    devices: int
    device_kind: str
    needed: int | None  # bytes of memory
    available: int | None
    fits: bool | None
    memory: dict[str, int] | None = None  # that needed, by what it is for; None where the compiler gave up
    flops: int | None = None
    bytes: int | None = None
    collectives: list[dict[str, Any]] | None = None
    seconds: dict[str, float] | None = None  # at least, by what takes them
    bound: str | None = None  # which of these is the longest
    compile_seconds: float | None = None
    loops_of_unknown_length: int = 0

    @property
    def longest(self) -> float:
        """The seconds that it takes at least."""
        return max(self.seconds.values()) if self.seconds else float("inf")
