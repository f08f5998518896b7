"""The public face: what `import flax_vae` offers, to people and to type checkers."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flax_vae

ROOT = Path(__file__).parents[1]
USER = """
from flax_vae import CausalVideoVAEConfig, Execution, VideoVAE, from_pretrained, make_mesh, sharded, stream, to_uint8

vae: VideoVAE = from_pretrained("default")
vae.execution = Execution(remat=True)
config: CausalVideoVAEConfig = CausalVideoVAEConfig.tiny()
frames: int = config.latent_frames(17)
reveal_type(vae.encode)
wrong: int = from_pretrained("default")
"""


def test_every_public_name_is_there_and_none_else_is():
    assert set(dir(flax_vae)) == set(flax_vae.__all__)
    assert 10 <= len(flax_vae.__all__) <= 16
    assert all(getattr(flax_vae, name) is not None for name in flax_vae.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Conv3d'"):
        _ = flax_vae.Conv3d  # layers are at flax_vae.layers


@pytest.mark.parametrize("room", ["ops", "models", "runtime"])
def test_rooms_resolve_at_the_first_access(room):
    code = f"import flax_vae; assert flax_vae.{room}.__name__ == 'flax_vae.{room}'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_the_package_imports_no_jax():
    code = "import sys, flax_vae; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_a_star_brings_is_the_list():
    names: dict = {}
    exec("from flax_vae import *", names)
    assert set(flax_vae.__all__) <= set(names)


@pytest.mark.skipif(not shutil.which("pyright") and importlib.util.find_spec("pyright") is None, reason="needs pyright")
@pytest.mark.slow
def test_a_type_checker_sees_the_types_from_outside(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "user.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    messages = json.loads(found.stdout)["generalDiagnostics"]
    errors = [each["message"] for each in messages if each["severity"] == "error"]
    assert len(errors) == 1, errors
    assert '"VideoVAE" is not assignable to "int"' in errors[0]
    assert any("DiagonalGaussian" in each["message"] for each in messages if each["severity"] == "information")
