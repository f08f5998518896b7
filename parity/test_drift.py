"""The drift report names the layer that departs, and why."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="parity compares with torch")

import flax_vae
import torch_ref
from flax_vae.io import port
from parity.drift import compare_layers, layer_at, main, random_clip, report
from parity.rows.pyramid import SHALLOW
from tests.resources import compiled_fast


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Compiles every layer of the models as fast as it can be done."""
    with compiled_fast():
        yield


@pytest.fixture(scope="module")
def reference() -> torch_ref.CausalVideoVAE:
    """A torch model with nothing trivial in it."""
    torch.manual_seed(0)
    vae = torch_ref.CausalVideoVAE.from_config(SHALLOW.to_dict())
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def ours(reference: torch_ref.CausalVideoVAE, dtype: str = "float64") -> flax_vae.CausalVideoVAE:
    """The same model in flax_vae."""
    vae = nnx.eval_shape(lambda: flax_vae.CausalVideoVAE(SHALLOW, rngs=nnx.Rngs(0)))
    weights = {name: value.numpy() for name, value in reference.float().state_dict().items()}
    port.load(vae, port.Arrays(weights), dtype)
    return vae


def rows(vae, reference, dtype="float64"):
    return compare_layers(vae, reference, random_clip(3, 6, 7, seed=1).astype(np.float32).astype(np.float64), dtype)


@pytest.mark.slow
def test_equal_models_do_not_depart(reference):
    found = rows(ours(reference), reference)
    assert len(found) > 50
    assert not any(row.departs for row in found)
    assert "No layer departs" in report(found)


def wrong_eps(vae):
    vae.decoder.up_blocks[0].resnets[1].norm2.eps = 1e-5


def wrong_weight(vae):
    kernel = vae.encoder.mid_block.attentions[0].to_k.kernel
    kernel[...] = kernel[...] + 1e-3


def symmetric_time(vae):
    vae.encoder.down_blocks[1].resnets[0].conv1.padding = ((1, 1), (1, 1), (1, 1))


def swapped_axes(vae):
    kernel = vae.encoder.conv_in.conv.kernel
    kernel[...] = kernel[...].swapaxes(1, 2)


def lost_shortcut(vae):
    block = vae.decoder.up_blocks[1].resnets[0]
    block.conv_shortcut.conv.kernel[...] *= 0
    block.conv_shortcut.conv.bias[...] *= 0


BREAKS = [
    (wrong_eps, "decoder.up_blocks.0.resnets.1.norm2", "eps is 1e-5"),
    (wrong_weight, "encoder.mid_block.attentions.0", "none of the known mistakes"),
    (symmetric_time, "encoder.down_blocks.1.resnets.0.conv1", "padded on both sides"),
    (swapped_axes, "encoder.conv_in", "height and width are swapped"),
    (lost_shortcut, "decoder.up_blocks.1.resnets.0.conv_shortcut", "none of the known mistakes"),
]


@pytest.mark.parametrize(
    ("break_it", "path", "cause"), [BREAKS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in BREAKS[1:])]
)
def test_the_departing_layer_and_its_cause_are_named(reference, break_it, path, cause):
    vae = ours(reference)
    break_it(vae)
    text = report(rows(vae, reference))
    assert f"first layer that departs is {path} " in text
    assert cause in text


@pytest.mark.slow
def test_lost_precision_is_named(reference):
    vae = ours(reference, "float32")
    conv = layer_at(vae, "decoder.conv_in.conv")
    conv.kernel[...] = conv.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    text = report(rows(vae, reference, "float32"))
    assert "first layer that departs is decoder.conv_in " in text
    assert "rounded to bfloat16" in text


@pytest.mark.slow
def test_the_command_compares_a_checkpoint_and_tells_by_its_exit_code(reference, tmp_path, capsys):
    pytest.importorskip("rich", reason="the command prints with rich")
    reference.float().save_pretrained(tmp_path)
    assert main(tmp_path, frames=3, size=8) == 0
    printed = capsys.readouterr().out
    assert "encoder.conv_in" in printed
    assert "No layer departs" in printed
