"""Who may import whom, read from the syntax trees: layers -> io -> models -> runtime -> train -> cli."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["layers", "io", "models", "runtime", "train", "cli"]
ORDER = ["geometry order", "window neighbour strips", "winograd stacked", "frames", "lowering", "conv", "norm"]
ORDER += ["attention again", "resnet resample", "chunks", "blocks"]
LAYERS = {name: place for place, names in enumerate(ORDER) for name in names.split()}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "flax_vae"}
TORCH = {"torch", "torchvision", "torch_ref"}
READS_TORCH = "flax_vae/io/weights.py"  # the one file that may import torch, where it reads torch's files
PUBLIC = {"flax_vae", "flax_vae.public"}  # the list of public names, which sees everything; only cli may look at it
SEES_NO_MODEL = {"flax_vae.runtime.stream", "flax_vae.runtime.tile"}
IMPORTERS = {"import_module", "importorskip", "__import__"}  # functions that import what a string names


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, root):
    """Yields (dotted name, whether inside a function) of everything a file imports."""
    package = path.relative_to(root).parent.parts

    def visit(node, lazy):
        match node:
            case ast.Import():
                yield from ((alias.name, lazy) for alias in node.names)
            case ast.ImportFrom():
                above = package[: len(package) - node.level + 1] if node.level else ()
                origin = ".".join([*above, *([node.module] if node.module else [])])
                # `from package import name` imports the module of that name, where there is one.
                folder = root / origin.replace(".", "/")
                for alias in node.names:
                    is_module = (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").is_file()
                    yield (f"{origin}.{alias.name}" if is_module else origin), lazy
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=[ast.Constant(value=str(what)), *_]):
                if name in IMPORTERS:
                    yield what, lazy
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def part(name):
    """Gives the place of a flax_vae module in the order of the packages; what sees all of them comes last."""
    names = name.split(".")
    return PACKAGES.index(names[1]) if len(names) > 1 and names[1] in PACKAGES else len(PACKAGES)


def forbidden(name, imported, lazy):
    """Says why module `name` may not import `imported`, or gives None."""
    top = imported.split(".")[0]
    if name.startswith("torch_ref"):
        return "torch_ref knows no jax" if top in JAX | {"parity"} else None
    if name.startswith("tests"):
        return "tests need no torch" if top in TORCH else None
    if top in TORCH and not (name == module_name(Path(READS_TORCH), Path()) and top == "torch" and lazy):
        return f"torch is imported in functions of {READS_TORCH} alone"
    if top == "parity" and not (part(name) == part("flax_vae.cli") and imported == "parity.demo" and lazy):
        return "of parity, cli may import demo, in a function"
    if top != "flax_vae" or name in PUBLIC:
        return None
    if name in SEES_NO_MODEL and imported.startswith("flax_vae.models"):
        return "it takes callables and knows no model"
    if part(imported) > part(name) and not (imported in PUBLIC and part(name) == part("flax_vae.cli")):
        return "arrows only point forward"
    own, other = (LAYERS.get(n.removeprefix("flax_vae.layers."), -1) for n in (name, imported))
    return f"inside layers: {', '.join(ORDER)}" if 0 <= own <= other else None


def violations(root):
    """Lists every import that is against the rules, in the packages under `root`."""
    found = []
    for path in sorted(p for folder in ("flax_vae", "torch_ref", "tests") for p in (root / folder).rglob("*.py")):
        name = module_name(path, root)
        for imported, lazy in imports(path, root):
            if reason := forbidden(name, imported, lazy):
                found.append(f"{name} imports {imported}: {reason}")
    return found


def test_every_import_points_forward():
    assert violations(ROOT) == []


def test_every_module_has_its_place():
    modules = [module_name(path, ROOT) for path in (ROOT / "flax_vae").rglob("*.py")]
    layers = {name.removeprefix("flax_vae.layers.") for name in modules if name.startswith("flax_vae.layers.")}
    assert layers == set(LAYERS)
    assert {name.split(".")[1] for name in modules if "." in name} <= {*PACKAGES, "public", "__main__"}


PLANTED = [
    ("flax_vae/layers/conv.py", "from flax_vae.layers.norm import CausalGroupNorm", "inside layers"),
    ("flax_vae/layers/norm.py", "from flax_vae.layers import attention", "inside layers"),
    ("flax_vae/layers/resnet.py", "from .resample import AvgPool3d", "inside layers"),
    ("flax_vae/layers/conv.py", "from flax_vae.families.pyramid import CausalVideoVAE", "forward"),
    ("flax_vae/layers/conv.py", "from flax_vae import CausalVideoVAE", "forward"),
    ("flax_vae/models/vae.py", "from flax_vae.public import Encoder", "forward"),
    ("flax_vae/layers/conv.py", "import flax_vae.io.port", "forward"),
    ("flax_vae/layers/conv.py", "from .. import io", "forward"),
    ("flax_vae/io/port.py", "def load():\n    from flax_vae.models import config", "forward"),
    ("flax_vae/models/vae.py", "from flax_vae.runtime import stream", "forward"),
    ("flax_vae/runtime/stream.py", "from flax_vae.train.loop import fit", "forward"),
    ("flax_vae/runtime/stream.py", "from flax_vae.families.pyramid import CausalVideoVAE", "no model"),
    ("flax_vae/runtime/tile.py", "import flax_vae.models.config", "no model"),
    ("flax_vae/train/loop.py", "from flax_vae.cli import main", "forward"),
    ("flax_vae/models/vae.py", "import torch", "functions of"),
    (READS_TORCH, "import torch", "functions of"),
    (READS_TORCH, "if True:\n    from torch import Tensor", "functions of"),
    ("flax_vae/io/video_reader.py", "def read():\n    import torch.utils", "functions of"),
    (READS_TORCH, "def read():\n    import torch_ref", "functions of"),
    ("flax_vae/io/port.py", "torch = __import__('importlib').import_module('torch')", "functions of"),
    ("flax_vae/cli.py", "from parity import demo", "in a function"),
    ("flax_vae/cli.py", "def main():\n    from parity import drift", "in a function"),
    ("flax_vae/io/port.py", "def main():\n    from parity import demo", "in a function"),
    ("torch_ref/layers/conv.py", "import jax.numpy as jnp", "no jax"),
    ("torch_ref/models/vae.py", "def load():\n    from flax_vae.models import config", "no jax"),
    ("tests/test_conv.py", "import torch", "no torch"),
    ("tests/test_conv.py", "def test():\n    pytest.importorskip('torch')", "no torch"),
    ("tests/test_conv.py", "from torch_ref import CausalConv3d", "no torch"),
]
ALLOWED = [
    ("flax_vae/__init__.py", "__import__('flax_vae.public')"),
    ("flax_vae/public.py", "from flax_vae.families.pyramid import CausalVideoVAE"),
    ("flax_vae/layers/blocks.py", "from flax_vae.layers import attention, resnet"),
    ("flax_vae/models/vae.py", "from flax_vae.io import port\nfrom .encoder import Encoder"),
    (READS_TORCH, "def read():\n    import torch"),
    ("flax_vae/cli.py", "from flax_vae import CausalVideoVAE\ndef main():\n    from parity import demo"),
    ("flax_vae/cli/demo.py", "from flax_vae.cli import screen\ndef main():\n    import parity.demo"),
    ("torch_ref/models/vae.py", "import torch\nfrom torch_ref.layers.conv import CausalConv3d"),
]
MODULES = ["layers/norm", "layers/attention", "layers/resample", "io/port", "models/config", "parity/demo"]


@pytest.fixture
def plant(tmp_path):
    """Gives a function that writes a file into an otherwise innocent tree and lists what is against the rules."""

    def write(path, source):
        for name in [f"flax_vae/{module}.py" for module in MODULES[:-1]] + ["parity/demo.py", "parity/drift.py", path]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / path).write_text(source)
        return violations(tmp_path)

    return write


@pytest.mark.parametrize(("path", "source", "reason"), PLANTED)
def test_planted_import_is_found(path, source, reason, plant):
    (found,) = plant(path, source)
    assert found.startswith(module_name(Path(path), Path()) + " imports ")
    assert reason in found


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_import_within_the_rules_is_not(path, source, plant):
    assert plant(path, source) == []
