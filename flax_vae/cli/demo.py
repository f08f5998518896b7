"""`flax-vae demo`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from flax_vae.cli.options import described

Out = Annotated[Path, described("DIR", "folder to write; made if it is not there")]
NEEDS = ("parity", "torch_ref", "torch", "av", "matplotlib", "skvideo")
INSTALL = 'in a clone of the repository, make demo, or pip install -e ".[torch,video,demo]"'


def demo(out: Out = Path("demo_output")) -> None:
    """Ports a torch checkpoint, compares torch with Flax on a real clip, and reconstructs the clip.

    The checkpoint is that of the small model in this package, which was trained on two CPU cores, without this clip:
    it shows what is lost, and that torch and Flax agree. Needs a clone of the repository and the extras torch, video
    and demo. Takes a few minutes.

    Example:
      flax-vae demo --out demo_output
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)} too: {INSTALL}")

    from parity.demo import run

    run(out)
