"""A program that is asked for, and the report on it once it is compiled."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Request:
    """A program that is asked for."""

    topology: str
    job: Literal["train", "encode", "decode"]
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
    memory: dict[str, int] | None = None  # the needed bytes by use; None where the compiler gave up
    flops: int | None = None
    bytes: int | None = None
    collectives: list[dict[str, Any]] | None = None
    seconds: dict[str, float] | None = None  # lower bounds by resource, see `roofline`
    bound: str | None = None  # the resource with the longest
    compile_seconds: float | None = None
    loops_of_unknown_length: int = 0

    @property
    def longest(self) -> float:
        """The lower bound on the run time in seconds; infinite where none is known."""
        return max(self.seconds.values()) if self.seconds else float("inf")
