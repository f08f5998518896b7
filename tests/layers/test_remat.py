"""Remat: the same values and gradients as without, in less memory. B batch, T frames, H W pixels, C channels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE
from flax_vae.layers.conv import CausalConv3d
from flax_vae.layers.resnet import CausalResnetBlock
from flax_vae.layers.scan import scan_chunks
from flax_vae.layers.sequence import Execution, run_layers
from tests.compiled import memory
from tests.little import CONFIG

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = dataclasses.replace(CONFIG, encoder_block_dropout=(0.2, 0.3), decoder_block_dropout=(0.4, 0.1))


@pytest.fixture(scope="module")
def models(randomized):
    """Gives the model without and with remat, with the same weights, the same random state, and dropout on."""

    def build(execution):
        vae = CausalVideoVAE(PLAIN, rngs=nnx.Rngs(0))
        nnx.update(vae, nnx.state(randomized(lambda rngs: CausalVideoVAE(PLAIN, rngs=rngs)), nnx.Param))
        vae.execution = execution
        return vae

    return build(Execution()), build(Execution(remat=True))


def loss(vae, x):
    posterior = vae.encode(x)
    return jnp.square(vae.decode(posterior.sample(jax.random.key(1))) - x).mean() + 1e-2 * posterior.kl()


def gradient_step(vae, x, loss=loss):
    """Runs a gradient step; gives its bytes, and the loss, the random state after it, and the gradients."""
    structure, parameters, state = nnx.split(vae, nnx.Param, ...)

    def run(parameters, x, state):
        vae = nnx.merge(structure, parameters, state, copy=True)
        return loss(vae, x), nnx.state(vae, nnx.RngCount)

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    program = step.lower(parameters, x, state).compile()
    return memory(program).temp_size_in_bytes, program(parameters, x, state)


def check_equal(results, expected):
    for a, b in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-12 if a.dtype == jnp.float64 else 16 * np.finfo(np.float32).eps
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


@pytest.fixture(scope="module")
def whole_steps(models, noise):
    """Gives a gradient step of the whole clip, plain and with remat."""
    return [gradient_step(vae, noise((1, 9, 32, 32, 3))) for vae in models]


@pytest.mark.slow
def test_values_gradients_and_random_state_equal_the_plain_ones(whole_steps):
    (_, expected), (_, results) = whole_steps
    check_equal(results, expected)
    (_, counts), gradients = expected
    assert {int(count) for count in jax.tree.leaves(counts)} == {1}  # every dropout has drawn once
    assert sum(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients)) > 90


@pytest.mark.slow
def test_remat_takes_less_memory(whole_steps, models, noise, monkeypatch):
    (plain, _), (remat, _) = whole_steps
    assert remat < 0.78 * plain  # 0.74; of the encoder or the decoder alone 0.82 and more
    monkeypatch.setattr("flax_vae.layers.resnet.remat", lambda function, *args: function(*args))
    everything_kept, _ = gradient_step(models[0], noise((1, 9, 32, 32, 3)))
    assert remat < 0.58 * everything_kept


@pytest.mark.parametrize("remat", [False, True])  # with remat: while the block is computed again
def test_a_residual_block_keeps_only_what_goes_into_its_norms(noise, monkeypatch, remat):
    def step():
        return gradient_step(Body(remat, rngs=nnx.Rngs(0)), x, lambda body, x: jnp.square(body.step(x)[0]).mean())

    x = noise((1, 9, 16, 16, 3)).astype(jnp.float32)
    needed, results = step()
    monkeypatch.setattr("flax_vae.layers.resnet.remat", lambda function, *args: function(*args))
    kept, expected = step()
    check_equal(results, expected)
    assert needed < 0.8 * kept


class Body(nnx.Module):
    """What an encoder threads a clip through, in little."""

    def __init__(self, remat, *, rngs):
        self.remat = remat
        self.conv, self.resnet = CausalConv3d(3, 4, 3, 2, rngs=rngs), CausalResnetBlock(4, None, 2, 0.3, rngs=rngs)

    def step(self, x, carry=None):
        return run_layers([self.conv, self.resnet], x, carry, Execution(self.remat))


@pytest.fixture
def bodies():
    """Gives a body without and with remat, with the same weights, the same random state, and dropout on."""
    return [Body(remat, rngs=nnx.Rngs(0)) for remat in (False, True)]


def test_in_chunks_too_values_gradients_and_random_state_equal_the_plain_ones(bodies, noise):
    def loss(body, x):
        return jnp.square(scan_chunks(body, Body.step, x, 4)[0]).mean()

    x = noise((2, 9, 3, 4, 3)).astype(jnp.float32)
    (_, expected), (_, results) = (gradient_step(body, x, loss) for body in bodies)
    check_equal(results, expected)
    assert {int(count) for count in jax.tree.leaves(expected[0][1])} == {3}


def test_a_carry_goes_through_remat(bodies, noise, jit, stream):
    x = noise((1, 5, 2, 3, 3)).astype(jnp.float32)
    for body in bodies:
        body.eval()
    expected, results = (stream(jit(Body.step, body), x, (1, 4)) for body in bodies)
    check_equal(results, expected)


def test_flax_jit_keeps_the_random_state_with_remat(bodies, noise):
    x = noise((1, 3, 2, 3, 3)).astype(jnp.float32)
    run = nnx.jit(lambda body, x: body.step(x)[0])
    expected, results = ([run(body, x) for _ in range(2)] for body in bodies)
    check_equal(results, expected)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # dropout has moved on


def test_a_model_with_remat_may_be_part_of_the_function_that_is_transformed(bodies, noise):
    x = noise((1, 3, 2, 3, 3)).astype(jnp.float32)
    for body in bodies:
        body.eval()
    expected, results = (
        jax.jit(jax.grad(lambda x, body=body: jnp.square(body.step(x)[0]).sum()))(x) for body in bodies
    )
    check_equal(results, expected)


def test_a_checkpoint_knows_no_remat_and_a_model_is_switched_after_loading(models, tmp_path):
    models[1].save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert "remat" not in values
    loaded = CausalVideoVAE.from_pretrained(tmp_path)
    assert loaded.execution == Execution()
    loaded.execution = Execution(remat=True)
    assert loaded.encoder.execution == loaded.decoder.execution == Execution(remat=True)
    (tmp_path / "config.json").write_text(json.dumps(values | {"remat": True}))
    with pytest.raises(ValueError, match="unknown config keys: remat"):
        CausalVideoVAE.from_pretrained(tmp_path)


def test_gradients_of_a_layer_are_passed_on_together(bodies, noise):
    """So that XLA computes those of the kernels before it goes on to the layer before."""
    structure, parameters, state = nnx.split(bodies[1], nnx.Param, ...)

    def loss(parameters, x):
        return jnp.square(nnx.merge(structure, parameters, state, copy=True).step(x)[0]).sum()

    x = noise((1, 3, 2, 3, 3)).astype(jnp.float32)
    together = [
        {variable.aval.shape for variable in equation.invars}
        for equation in jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(parameters, x).eqns
        if equation.primitive.name == "optimization_barrier"
    ]
    for kernel, size in (((3, 3, 3, 3, 4), x.shape), ((3, 3, 3, 4, 4), (1, 2, 2, 3, 4))):
        assert any({kernel, size} <= shapes for shapes in together)
