"""Options that several jobs share, in the words of the command line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How a job reads its clips and computes.

    Attributes:
      size: pixels: the short side as "256", or height x width as "288x512"; None is the clip's own, at most 256.
      frames: reads at most N frames.
      memory: stays within it, as "4GiB"; None is a share of the device's.
      mesh: devices that share the work, as "height=2,width=2"; None is one device.
      precision: dtype of weights and activations, "float32" or "bfloat16".
      frame_by_frame: computes each block one frame after the other, in less memory.
      lossy_tiles: computes frames in blended tiles, which changes the results.
      resume: goes on with a job that was stopped.

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
        if self.memory is not None:
            _ = self.budget

    @property
    def budget(self) -> int:
        """The memory to stay within, in bytes."""
        from flax_vae.runtime.memory import available_bytes, parse_bytes  # loads jax, which --help does not wait for

        return available_bytes() if self.memory is None else parse_bytes(self.memory)
