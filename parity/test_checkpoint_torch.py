"""Checkpoints that torch wrote, and ours that torch reads: the same bits, and no file that can run code."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="these files are torch's")

import torch
from flax import nnx

import flax_vae
import torch_ref
from flax_vae.families.pyramid import narrow
from flax_vae.io import checkpoint, port

CONFIG = narrow((4, 4, 8, 8), groups=2, encoder_layers=1, decoder_layers=1)
DTYPES = ["float64", "float32", "float16", "bfloat16"]


@pytest.fixture(scope="module")
def vae():
    """The torch model with no weight left at zero or one."""
    model = torch_ref.CausalVideoVAE.from_config(CONFIG.to_dict())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model


def state(vae, dtype="float32") -> dict[str, torch.Tensor]:
    return {key: tensor.detach().to(getattr(torch, dtype)) for key, tensor in vae.state_dict().items()}


def as_bytes(tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def equal(model: flax_vae.CausalVideoVAE, weights: dict[str, torch.Tensor]) -> bool:
    ours = port.torch_layout(model)
    return ours.keys() == weights.keys() and all(ours[key].tobytes() == as_bytes(weights[key]) for key in weights)


def read(path) -> dict[str, np.ndarray]:
    source = checkpoint.open_checkpoint(path)
    return {key: source.read(key) for key in source.shapes()}


def refusal(path: Path) -> str:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:
        read(path)
    assert sorted(path.parent.rglob("*")) == before
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own message advises to turn it off
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("suffix", "as_zip"), [(".bin", True), (".pt", True), (".pth", False)])
def test_torch_files_load_bit_for_bit(tmp_path, vae, dtype, suffix, as_zip):
    weights = state(vae, dtype)
    path = tmp_path / f"diffusion_pytorch_model{suffix}"
    torch.save(weights, path, _use_new_zipfile_serialization=as_zip)
    assert equal(flax_vae.CausalVideoVAE.from_pretrained(path, dtype=dtype, config=CONFIG), weights)
    source = checkpoint.open_checkpoint(tmp_path)
    assert source.shapes() == {key: (tuple(x.shape), dtype) for key, x in weights.items()}


@pytest.mark.parametrize("max_shard_size", [None, 20_000])
def test_directories_that_torch_saved_load_bit_for_bit(tmp_path, vae, max_shard_size):
    vae.save_pretrained(tmp_path, max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (max_shard_size is None)
    ours = flax_vae.CausalVideoVAE.from_pretrained(tmp_path)
    assert ours.config == CONFIG
    assert equal(ours, state(vae))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_directories_that_we_save_load_into_torch_bit_for_bit(tmp_path, vae, dtype):
    ours = nnx.eval_shape(lambda: flax_vae.CausalVideoVAE(CONFIG, rngs=nnx.Rngs(0)))
    weights = state(vae, dtype)
    torch.save(weights, tmp_path / "weights.pt")
    source = checkpoint.open_checkpoint(tmp_path / "weights.pt")
    port.load(ours, source, dtype)
    ours.save_pretrained(tmp_path / "saved")
    theirs = torch_ref.CausalVideoVAE.from_pretrained(tmp_path / "saved").state_dict()
    assert list(theirs) == list(weights)
    assert all(torch.equal(theirs[key], weights[key].float()) for key in weights)


def test_views_and_transposed_and_trained_tensors_are_read_as_they_are(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "transposed": base.reshape(4, 6).t(),
        "view": base[3:9],
        "shared": base.reshape(2, 12),
        "bfloat16 transposed": base.reshape(2, 12).bfloat16().t(),
        "parameter": torch.nn.Parameter(base.reshape(3, 8)),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }
    torch.save(tensors, tmp_path / "some.pt")
    found = read(tmp_path / "some.pt")
    assert all(f"torch.{found[key].dtype}" == str(x.dtype) for key, x in tensors.items())
    assert {key: array.shape for key, array in found.items()} == {key: tuple(x.shape) for key, x in tensors.items()}
    assert all(np.array_equal(found[key].astype(float), tensors[key].detach().double().numpy()) for key in tensors)


@pytest.mark.parametrize("containers", [["model"], ["state_dict"], ["model", "state_dict"]])
@pytest.mark.parametrize("prefix", ["", "vae.", "module.vae."])
def test_training_checkpoints_load(tmp_path, vae, containers, prefix):
    content = {prefix + key: tensor for key, tensor in state(vae).items()}
    if "vae." in prefix:
        content[f"{prefix.replace('vae.', 'loss.')}discriminator.main.0.weight"] = torch.zeros(2, 3, 4, 4)
    for name in reversed(containers):
        content = {name: content, "optimizer": {"state": {0: torch.ones(3)}, "lr": 1e-4}, "epoch": 7}
    torch.save(content, tmp_path / "last.pth")
    assert equal(flax_vae.CausalVideoVAE.from_pretrained(tmp_path / "last.pth", config=CONFIG), state(vae))


class Malicious:
    """Would make the file `ran` when unpickled without care."""

    def __init__(self, directory: Path):
        self.command = f"touch '{directory / 'ran'}'"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "protocol 0"])
@pytest.mark.parametrize("place", ["alone", "model", "beside"])
def test_no_file_runs_a_command(tmp_path, suffix, form, place):
    path, trap = tmp_path / f"model{suffix}", Malicious(tmp_path)
    content = {"alone": trap, "model": {"model": {"a.weight": trap}}, "beside": {"a.weight": torch.ones(2), "x": trap}}[
        place
    ]
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=0 if form == "protocol 0" else 4))
    message = refusal(path)
    if suffix != ".safetensors":
        assert "it would run posix.system" in message or "it would run nt.system" in message
    with pytest.raises(ValueError):
        flax_vae.CausalVideoVAE.from_pretrained(tmp_path, config=CONFIG)
    assert not (tmp_path / "ran").exists()


def looped() -> dict:
    content = {}
    content["model"] = content
    return content


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


STRANGE = {
    "numpy array": (lambda: {"a": np.ones(3)}, "no tensors by name, but 'a'"),
    "number": (lambda: 3, "a int"),
    "list": (lambda: [torch.ones(2)], "a list"),
    "names that are numbers": (lambda: {0: torch.ones(2)}, "a dict"),
    "loop": (looped, "'model'"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "'a' is no plain tensor, but a sparse_tensor"),
    "quantized": (lambda: {"a": quantized()}, "'a' is no plain tensor, but a qtensor"),
    "without data": (lambda: {"a": torch.ones(3, device="meta")}, "'a' is no plain tensor, but a meta_tensor"),
    "negated": (
        lambda: {"a": torch.ones(3, dtype=torch.complex64).conj().imag},
        "'a' is no plain tensor, but a negated",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(TypedStorage|quantize_per_tensor)")
@pytest.mark.parametrize(("make", "said"), STRANGE.values(), ids=STRANGE.keys())
def test_files_without_plain_tensors_are_refused_by_name(tmp_path, make, said):
    torch.save(make(), tmp_path / "strange.pt")
    assert said in refusal(tmp_path / "strange.pt")


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 30, 0.3, 0.9, -1])
def test_files_cut_short_are_refused(tmp_path, as_zip, kept):
    path = tmp_path / "cut.pt"
    torch.save({"a": torch.arange(30_000.0)}, path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
    message = refusal(path)
    if kept == 0:
        assert "an empty file" in message


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
def test_mislabelled_files_are_refused_with_what_they_are(tmp_path, vae):
    vae.save_pretrained(tmp_path)
    weights = (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "model.bin")
    assert "end its name in .safetensors" in refusal(weights)
    torch.save(state(vae), tmp_path / "model.safetensors")
    assert "end its name in .bin, .pt, .pth" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    assert "web page" in refusal(tmp_path / "page.pt")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(tmp_path / "pointer.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refusal(tmp_path / "script.pt")


MEASURE = """
import re, sys
import jax
import jax.numpy as jnp
import torch
from flax_vae import CausalVideoVAE, CausalVideoVAEConfig

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])

jax.block_until_ready(jnp.zeros(1))
before = peak()
vae = CausalVideoVAE.from_pretrained(sys.argv[1], config=CausalVideoVAEConfig.released())
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_full_model_in_a_torch_file_is_loaded_in_less_than_one_and_a_half_times_its_size(tmp_path):
    model = nnx.eval_shape(lambda: flax_vae.CausalVideoVAE(flax_vae.CausalVideoVAEConfig.released(), rngs=nnx.Rngs(0)))
    shapes = port.named_tensors(model).shapes()
    weights = {key: torch.randn(shape) for key, (shape, _) in shapes.items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    path = tmp_path / "full.pt"
    torch.save(weights, path)
    del weights
    try:
        root = Path(checkpoint.__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", MEASURE, path]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    assert 1.0 <= int(result.stdout) / size <= 1.5


@pytest.mark.slow
@pytest.mark.large
def test_full_model_from_a_public_directory_computes_what_torchs_does(tmp_path):
    theirs = torch_ref.CausalVideoVAE.from_config(flax_vae.CausalVideoVAEConfig.released().to_dict()).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=2**29)
    ours = flax_vae.CausalVideoVAE.from_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    clip = np.random.default_rng(0).uniform(-1, 1, (1, 9, 32, 32, 3)).astype(np.float32)
    with torch.inference_mode():
        mean = theirs.encode(torch.from_numpy(clip).permute(0, 4, 1, 2, 3)).mode()
        video = theirs.decode(mean)
    with jax.default_matmul_precision("highest"):
        latents = nnx.jit(lambda vae, x: vae.encode(x).mode())(ours, clip)
        again = nnx.jit(lambda vae, z: vae.decode(z))(ours, latents)
    for mine, true in ((latents, mean), (again, video)):
        true = true.permute(0, 2, 3, 4, 1).numpy()
        assert np.abs(np.asarray(mine) - true).max() <= 1e-5 * np.abs(true).max()
