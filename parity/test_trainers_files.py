"""Files as trainers save them with torch: whatever lies beside the weights, they load, to the bit."""

import argparse
import collections
import datetime
import enum
import pathlib
import types
from dataclasses import dataclass

import numpy as np
import pytest

pytest.importorskip("torch", reason="these files are torch's")

import torch

import flax_vae
import torch_ref
from flax_vae.families.pyramid import narrow
from flax_vae.io import port
from flax_vae.io.checkpoint import open_checkpoint

CONFIG = narrow((4, 4, 4, 8), groups=2, encoder_layers=1, decoder_layers=1)
MODEL = flax_vae.CausalVideoVAE.abstract(CONFIG)


class Phase(enum.Enum):
    """Of a training."""

    WARM = "warm"


@dataclass
class Settings:
    """Of a training."""

    lr: float
    out: pathlib.PurePath


@pytest.fixture(scope="module")
def vae():
    """The torch model with no weight left at zero or one."""
    model = torch_ref.CausalVideoVAE.from_config(CONFIG.to_dict())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return model


def loads(path, vae, **asked) -> bool:
    """Whether a file gives exactly the weights of a model."""
    source = open_checkpoint(path, **asked)
    names = port.match(MODEL, source.shapes())
    theirs = {key: tensor.detach().numpy() for key, tensor in vae.state_dict().items()}
    return names.keys() == theirs.keys() and all(np.array_equal(source.read(names[key]), theirs[key]) for key in names)


def trained(vae) -> dict:
    """Returns an optimizer's and a scheduler's state after a step."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


BESIDE = {
    "args": lambda: argparse.Namespace(lr=1e-4, output_dir=pathlib.Path("out"), nested=argparse.Namespace(a=(1, 2))),
    "numpy": lambda: {"loss": np.float64(0.5), "history": np.arange(3), "step": np.int64(3), "dtype": np.dtype("f2")},
    "random": lambda: {"torch": torch.get_rng_state(), "numpy": np.random.default_rng(0).bit_generator.state},
    "when": lambda: [datetime.datetime(2024, 5, 1), datetime.timedelta(days=3), datetime.timezone.utc],  # noqa: UP017
    "containers": lambda: [collections.defaultdict(list, a=[1]), collections.Counter("abc"), collections.deque([1])],
    "objects": lambda: [Phase.WARM, Settings(1e-4, pathlib.PurePosixPath("x")), types.SimpleNamespace(a=1)],
    "torch": lambda: [torch.device("cpu"), torch.Size([1, 2]), torch.bfloat16, torch.strided, torch.nn.Linear(2, 2)],
    "sets": lambda: {"a": {pathlib.Path("b")}, (1, 2): frozenset({3}), pathlib.Path("c"): 1 + 2j, 4: slice(1, 2)},
    "loss": lambda: {"discriminator.main.0.weight": torch.zeros(4, 3, 4, 4), "logvar": torch.zeros(())},
}


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_the_weights_does_not_matter(tmp_path, vae, beside, as_zip):
    content = {"model": vae.state_dict(), "epoch": 3, beside: BESIDE[beside]()} | trained(vae)
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=as_zip)
    assert loads(tmp_path / "checkpoint.pth", vae)


def test_all_of_it_at_once_as_a_lightning_file(tmp_path, vae):
    weights = {f"first_stage_model._orig_mod.{key}": tensor for key, tensor in vae.state_dict().items()}
    content = {"state_dict": weights, "hyper_parameters": {key: make() for key, make in BESIDE.items()}} | trained(vae)
    torch.save(content, tmp_path / "last.ckpt")
    assert loads(tmp_path / "last.ckpt", vae)


@pytest.mark.parametrize(
    "name", ["ema", "model_ema", "ema_state_dict", "model_state_dict", "module", "state_dict", "net"]
)
def test_the_container_may_be_called_anything(tmp_path, vae, name):
    torch.save({name: vae.state_dict(), "step": 1, "n_averaged": torch.tensor(3)}, tmp_path / "a.pt")
    assert loads(tmp_path / "a.pt", vae)


def test_averaged_models_and_wrapped_ones_load(tmp_path, vae):
    averaged = torch.optim.swa_utils.AveragedModel(vae)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert "n_averaged" in open_checkpoint(tmp_path / "swa.pt").shapes()
    assert loads(tmp_path / "swa.pt", vae)
    torch.save({**vae.state_dict(), "epoch": 3, "n_averaged": torch.tensor(3)}, tmp_path / "flat.pt")
    assert loads(tmp_path / "flat.pt", vae)
    compiled = torch.compile(torch.nn.DataParallel(vae))
    torch.save(compiled.state_dict(), tmp_path / "compiled.pt")
    assert loads(tmp_path / "compiled.pt", vae)


def test_weights_by_parts_of_the_model_load(tmp_path, vae):
    parts = {name: child.state_dict() for name, child in vae.named_children()}
    torch.save(parts | {"step": 1}, tmp_path / "parts.pt")
    assert loads(tmp_path / "parts.pt", vae)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_loads_by_its_names_without_its_class(tmp_path, vae, as_zip):
    torch.save({"model": vae, "epoch": 1}, tmp_path / "module.pt", _use_new_zipfile_serialization=as_zip)
    assert loads(tmp_path / "module.pt", vae)


def test_one_state_dict_under_two_names_is_one(tmp_path, vae):
    weights = vae.state_dict()
    torch.save({"model": weights, "state_dict": weights}, tmp_path / "a.pt")
    assert loads(tmp_path / "a.pt", vae)


def test_weights_and_their_average_are_told_apart_and_can_be_named(tmp_path, vae):
    noise = {key: torch.randn_like(tensor) for key, tensor in vae.state_dict().items()}
    torch.save({"model": noise, "ema": vae.state_dict()}, tmp_path / "both.pt")
    with pytest.warns(UserWarning, match="several models, in 'ema', 'model': 'ema', the averaged weights, is taken"):
        assert loads(tmp_path / "both.pt", vae)
    assert not loads(tmp_path / "both.pt", vae, part="model")
    assert loads(tmp_path / "both.pt", vae, part="ema")
    torch.save({"model": noise, "state_dict": vae.state_dict()}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="several models, in 'model', 'state_dict': name one, as `part`"):
        loads(tmp_path / "two.pt", vae)
    assert loads(tmp_path / "two.pt", vae, part="state_dict")


@pytest.mark.parametrize("change", [lambda x: x.to_sparse(), lambda x: x.to("meta"), lambda x: x.long()])
def test_a_tensor_of_the_model_that_is_not_plain_is_refused_by_name(tmp_path, vae, change):
    weights = vae.state_dict()
    weights["quant_conv.conv.bias"] = change(weights["quant_conv.conv.bias"])
    torch.save({"model": weights}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"wrong dtype: model\.quant_conv\.conv\.bias is (sparse|meta|int64)"):
        loads(tmp_path / "a.pt", vae)


def test_names_by_which_torch_saves_tensors_are_all_known(tmp_path):
    with_attributes = torch.ones(3)
    vars(with_attributes)["note"] = "kept"
    parameter = torch.nn.Parameter(torch.ones(3))
    vars(parameter)["note"] = "kept"
    content = {"plain": torch.ones(3), "attributes": with_attributes, "parameter": parameter}
    content |= {"unsigned": torch.ones(3, dtype=torch.uint16), "eighth": torch.ones(3, dtype=torch.float8_e4m3fn)}
    torch.save(content, tmp_path / "a.pt")
    source = open_checkpoint(tmp_path / "a.pt")
    dtypes = ["float32", "float32", "float32", "uint16", "float8_e4m3fn"]
    assert source.shapes() == {key: ((3,), dtype) for key, dtype in zip(content, dtypes, strict=True)}
    assert all(np.array_equal(source.read(key).astype(float), np.ones(3)) for key in content)
