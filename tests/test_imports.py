"""Who may import whom, read from the syntax trees; imports that strings name count too."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room may import from the rooms of earlier floors and from itself; rooms of one floor do not import each other.
FLOORS = ["ops", "layers", "io", "models", "families metrics runtime", "train", "jobs planning", "cli"]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
# Who looks a family up; everything else asks the contract in models.
SEES_FAMILIES = re.compile(r"flax_vae\.(families|jobs|planning|cli|public$|train\.(loop|averaged)$)")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "flax_vae"}
TORCH = {"torch", "torchvision", "torch_ref"}
PUBLIC = {"flax_vae", "flax_vae.public"}  # the list of public names, which sees everything and is seen by nothing
MODULE_NAME = re.compile(r"(?:flax_vae|torch_ref|parity)(?:\.[a-z_]\w*)+")
MAX_MODULES = 15  # of a folder, unless its __init__ gives a reason


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, root):
    """Yields (dotted name, whether inside a function) of everything that a file imports or names in a string."""
    package = path.relative_to(root).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}

    def is_module(name):
        place = root / name.replace(".", "/")
        return place.is_dir() or place.with_suffix(".py").is_file()

    def visit(node, lazy):
        match node:
            case ast.Import():
                yield from ((alias.name, lazy) for alias in node.names)
            case ast.ImportFrom():
                above = package[: len(package) - node.level + 1] if node.level else ()
                origin = ".".join([*above, *([node.module] if node.module else [])])
                # `from package import name` imports the module of that name, where there is one
                for alias in node.names:
                    yield f"{origin}.{alias.name}" if is_module(f"{origin}.{alias.name}") else origin, lazy
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=[ast.Constant(value=str(what)), *_]):
                if name in ("import_module", "importorskip", "__import__"):
                    yield what, lazy
            case ast.Constant(value=str(text)) if id(node) not in docstrings and MODULE_NAME.fullmatch(text):
                if is_module(text):
                    yield text, lazy
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def floor(name):
    """Returns the floor of a flax_vae module; what sees all of them comes last."""
    room = [*name.split("."), ""][1]
    return FLOOR.get(room, len(FLOORS))


def forbidden(name, imported, lazy):
    """Says why module `name` may not import `imported`; None where it may."""
    top = imported.split(".")[0]
    if name.startswith("torch_ref"):
        return "torch_ref knows no jax" if top in JAX | {"parity"} else None
    if name.startswith("tests"):
        return "tests need no torch" if top in TORCH else None
    if name.startswith(("parity", "benchmarks")):
        is_cli = imported.startswith("flax_vae.cli")
        return "cli is no library: what it shares with others is in jobs or planning" if is_cli else None
    if top in TORCH:
        return "torch's files are read without torch"
    if top == "parity" and not (name == "flax_vae.cli.demo" and imported == "parity.demo" and lazy):
        return "of parity, cli.demo may import demo, in a function"
    if top != "flax_vae" or name in PUBLIC:
        return None
    if imported in PUBLIC:
        return "the public face is for users"
    if imported.startswith("flax_vae.families") and not SEES_FAMILIES.match(name):
        return "it asks the contract in models, and knows no family"
    same_room = name.split(".")[1:2] == imported.split(".")[1:2]
    return "arrows only point forward" if floor(imported) >= floor(name) and not same_room else None


def files(root):
    """Lists the Python files that the rules are about."""
    folders = ("flax_vae", "torch_ref", "parity", "benchmarks", "tests")
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def violations(root):
    """Lists every import that is against the rules, in the packages under `root`."""
    found = []
    for path in files(root):
        name = module_name(path, root)
        if name == "tests.test_imports":
            continue  # its strings name what is forbidden
        for imported, lazy in imports(path, root):
            if reason := forbidden(name, imported, lazy):
                found.append(f"{name} imports {imported}: {reason}")
    return found


def circles(root):
    """Lists the modules of each circle of imports, lazy ones and those for type checkers included."""
    graph = {module_name(path, root): path for path in files(root) if "tests" not in path.parts}
    graph = {name: {found for found, _ in imports(path, root)} & graph.keys() for name, path in graph.items()}
    reach = {name: set(found) for name, found in graph.items()}
    changed = True
    while changed:
        before = {name: len(found) for name, found in reach.items()}
        for name, found in reach.items():
            reach[name] = found.union(*(reach[other] for other in found))
        changed = any(len(reach[name]) != count for name, count in before.items())
    return sorted(name for name in graph if name in reach[name])


def test_every_import_points_forward():
    assert violations(ROOT) == []


def test_no_imports_go_in_a_circle():
    assert circles(ROOT) == []


def test_every_module_is_in_a_room():
    modules = [module_name(path, ROOT) for path in (ROOT / "flax_vae").rglob("*.py")]
    assert {name.split(".")[1] for name in modules if "." in name} == {*FLOOR, "public", "__main__"}


def test_no_folder_has_too_many_modules():
    for folder in {path.parent for path in (ROOT / "flax_vae").rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_MODULES, f"{folder.name} holds two ideas: {sorted(path.name for path in modules)}"


PLANTED = [
    ("flax_vae/ops/window.py", "from flax_vae.layers.norm import CausalGroupNorm", "forward"),
    ("flax_vae/layers/conv.py", "from flax_vae.models.vae import VideoVAE", "forward"),
    ("flax_vae/layers/conv.py", "from flax_vae import CausalVideoVAE", "for users"),
    ("flax_vae/models/vae.py", "from flax_vae.public import VideoVAE", "for users"),
    ("flax_vae/layers/conv.py", "import flax_vae.io.port", "forward"),
    ("flax_vae/layers/conv.py", "from .. import io", "forward"),
    ("flax_vae/io/port.py", "def load():\n    from flax_vae.models import config", "forward"),
    ("flax_vae/models/vae.py", "from flax_vae.runtime import stream", "forward"),
    ("flax_vae/runtime/stream.py", "from flax_vae.train.loop import fit", "forward"),
    ("flax_vae/runtime/stream.py", "from flax_vae.metrics import psnr", "forward"),
    ("flax_vae/planning/worker.py", "WORKER = 'flax_vae.cli.plan'", "forward"),
    ("flax_vae/planning/worker.py", "from flax_vae.jobs import encode", "forward"),
    ("flax_vae/train/loop.py", "from flax_vae.cli import main", "forward"),
    ("flax_vae/train/step.py", "from flax_vae.families import registry", "knows no family"),
    (
        "flax_vae/runtime/stream.py",
        "def f():\n    from flax_vae.families.pyramid import CausalVideoVAE",
        "knows no family",
    ),
    ("flax_vae/models/vae.py", "import torch", "without torch"),
    ("flax_vae/io/weights.py", "import torch", "without torch"),
    ("flax_vae/io/weights.py", "if True:\n    from torch import Tensor", "without torch"),
    ("flax_vae/io/port.py", "def read():\n    import torch.utils", "without torch"),
    ("flax_vae/io/weights.py", "def read():\n    import torch_ref", "without torch"),
    ("flax_vae/io/port.py", "torch = __import__('importlib').import_module('torch')", "without torch"),
    ("flax_vae/cli/demo.py", "from parity import demo", "in a function"),
    ("flax_vae/cli/demo.py", "def main():\n    from parity import drift", "in a function"),
    ("flax_vae/io/port.py", "def main():\n    from parity import demo", "in a function"),
    ("torch_ref/layers/conv.py", "import jax.numpy as jnp", "no jax"),
    ("torch_ref/families/pyramid.py", "def load():\n    from flax_vae.models import config", "no jax"),
    ("parity/demo.py", "from flax_vae.cli import plan", "no library"),
    ("benchmarks/speed.py", "def main():\n    from flax_vae.cli.plan import show", "no library"),
    ("tests/test_conv.py", "import torch", "no torch"),
    ("tests/test_conv.py", "def test():\n    pytest.importorskip('torch')", "no torch"),
    ("tests/test_conv.py", "from torch_ref import CausalConv3d", "no torch"),
]
ALLOWED = [
    ("flax_vae/__init__.py", "__import__('flax_vae.public')"),
    ("flax_vae/public.py", "from flax_vae.models.vae import VideoVAE"),
    ("flax_vae/layers/resnet.py", "from flax_vae.layers import attention, conv"),
    (
        "flax_vae/models/vae.py",
        '"""See flax_vae.cli.plan."""\nfrom flax_vae.io import port\nfrom .config import VAEConfig',
    ),
    ("flax_vae/train/loop.py", "from flax_vae.families import registry"),
    ("flax_vae/cli/demo.py", "from flax_vae.jobs import encode\ndef main():\n    import parity.demo"),
    ("torch_ref/families/pyramid.py", "import torch\nfrom torch_ref.layers.conv import CausalConv3d"),
]
ROOMS = ["layers/norm", "layers/attention", "io/port", "models/config", "metrics/psnr", "families/pyramid", "cli/plan"]


@pytest.fixture
def plant(tmp_path):
    """Returns a function that writes files into an otherwise innocent tree, and the tree."""
    names = [*(f"flax_vae/{module}.py" for module in ROOMS), "flax_vae/jobs/encode.py"]
    for name in [*names, "flax_vae/runtime/stream.py", "parity/demo.py", "parity/drift.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def write(path, source):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
        return tmp_path

    return write


@pytest.mark.parametrize(("path", "source", "reason"), PLANTED)
def test_planted_import_is_found(path, source, reason, plant):
    (found,) = violations(plant(path, source))
    assert found.startswith(module_name(Path(path), Path()) + " imports ")
    assert reason in found


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_import_within_the_rules_is_not(path, source, plant):
    assert violations(plant(path, source)) == []


def test_a_circle_is_found_where_one_of_its_imports_is_for_type_checkers_alone(plant):
    plant("flax_vae/io/port.py", "from flax_vae.io import weights")
    root = plant("flax_vae/io/weights.py", "if TYPE_CHECKING:\n    from flax_vae.io.port import Layout")
    assert circles(root) == ["flax_vae.io.port", "flax_vae.io.weights"]
