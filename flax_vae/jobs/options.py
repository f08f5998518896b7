"""Options that several jobs share, in the words of the command line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How a job reads its clips and computes; ValueError where `memory` is no amount of memory."""

    size: str | None = None  # pixels, "256" for the short side or "288x512"; None is the clip's own, at most 256
    frames: int | None = None  # to read at most
    memory: str | None = None  # to stay within, as "4GiB"; None is a share of the device's
    mesh: str | None = None  # devices that share the work, as "height=2,width=2"; None is one device
    precision: str = "float32"  # dtype of weights and activations, or "bfloat16"
    frame_by_frame: bool = False  # compute each block one frame after the other, in less memory
    lossy_tiles: bool = False  # compute frames in blended tiles, which changes the results
    resume: bool = False  # go on with a job that was stopped

    def __post_init__(self):
        if self.memory is not None:
            _ = self.budget

    @property
    def budget(self) -> int:
        """The memory to stay within, in bytes."""
        from flax_vae.runtime.memory import available_bytes, parse_bytes  # loads jax, which --help does not wait for

        return available_bytes() if self.memory is None else parse_bytes(self.memory)
