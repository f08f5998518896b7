"""What several jobs can be told, in the words of the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How a job reads its clips and computes.

    Attributes:
      size: pixels, the short side as "256" or height x width as "288x512"; None is the clip's own, at most 256.
      frames: at most so many are read.
      memory: what to stay within, as "4GiB"; None is a share of the device's.
      mesh: devices that share the work, as "height=2,width=2"; None is one device.
      precision: what weights and frames are computed in, "float32" or "bfloat16".
      frame_by_frame: compute each block one frame after the other, in less memory.
      lossy_tiles: compute frames in blended tiles, which changes what comes out.
      resume: go on with what was done before the job was stopped.

    Raises:
      ValueError: `memory` is no amount of memory.
    """

    size: str | None = None
    frames: int | None = None
    memory: str | None = None
    mesh: str | None = None
    precision: str = "float32"
    frame_by_frame: bool = False
    lossy_tiles: bool = False
    resume: bool = False

    def __post_init__(self):
        _ = self.budget

    @property
    def budget(self) -> int | None:
        """The memory to stay within, in bytes; None for the device's own."""
        from flax_vae.runtime.memory import parse_bytes

        return None if self.memory is None else parse_bytes(self.memory)
