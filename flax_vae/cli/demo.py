"""`flax-vae demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Out = Annotated[Path, arg(metavar="DIR", help="folder to write; made if it is not there")]


def demo(out: Out = Path("demo_output")) -> None:
    """Ports a torch checkpoint, compares torch with Flax on a real clip, and reconstructs the clip.

    The checkpoint is made on the spot, with random weights, so the reconstruction shows noise; what it shows is that
    torch and Flax agree. Needs a clone of the repository and the extras torch and video. Takes a minute or two.

    Example:
      flax-vae demo --out demo_output
    """
    from parity.demo import run

    run(out)
