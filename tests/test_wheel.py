"""The package as people install it: what is in the wheel, and that it works where nothing else of the clone is."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROUND_TRIP = """
import numpy as np, flax_vae
assert flax_vae.__file__.startswith(__import__("sys").argv[1]), flax_vae.__file__
vae = flax_vae.from_pretrained("default")
clip = np.zeros((1, 9, 16, 24, 3), np.float32)
assert vae.decode(vae.encode(clip).mode()).shape == clip.shape
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if copy.returncode:
        pytest.skip("the wheel is built from the files that git knows: run in a clone")
    for name in filter(None, copy.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", folder, folder / "source"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flax_vae"}
    weights = ["flax_vae/default_weights/config.json", "flax_vae/default_weights/diffusion_pytorch_model.safetensors"]
    assert {*weights, "flax_vae/py.typed"} <= set(names)
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_alone_loads_the_default_weights_and_makes_the_round_trip(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{ROUND_TRIP}"]
    subprocess.run([*command, str(tmp_path / "site")], cwd=tmp_path, check=True)
