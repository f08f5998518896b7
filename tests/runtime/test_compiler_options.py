"""XLA orders a CPU's programs for memory where a process asks for it, and takes less."""

import os
import subprocess
import sys

import pytest

from flax_vae.runtime.compiler_options import BARRIER_FLAG, SCHEDULER_FLAG, order_for_memory

CONVOLUTIONS = """
from flax_vae.runtime.compiler_options import order_for_memory
if {ordered}:
    order_for_memory()
import jax, jax.numpy as jnp
from flax import nnx
from flax_vae.layers.conv import CausalConv3d
layers = [CausalConv3d(256, 256, 3, rngs=nnx.Rngs(0)) for _ in range(6)]
def convolved(layers, x):
    for layer in layers:
        x, _ = layer(x)
    return x
program = jax.jit(convolved).lower(layers, jax.ShapeDtypeStruct((1, 5, 32, 32, 256), jnp.float32)).compile()
print(program.memory_analysis().temp_size_in_bytes)
"""


def temporary_bytes(ordered: bool) -> int:
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", CONVOLUTIONS.format(ordered=ordered)]
    return int(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_a_program_takes_less_memory():
    assert temporary_bytes(ordered=True) < 0.9 * temporary_bytes(ordered=False)


@pytest.mark.parametrize(
    "flags", ["", "--xla_cpu_max_isa=AVX2", f"--{SCHEDULER_FLAG[0]}=true", f"--{BARRIER_FLAG[0]}=dce"]
)
def test_flags_of_the_user_stay(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    order_for_memory()
    assert os.environ["XLA_FLAGS"].startswith(flags)
    assert [os.environ["XLA_FLAGS"].count(name) for name, _ in (SCHEDULER_FLAG, BARRIER_FLAG)] == [1, 1]


@pytest.mark.parametrize("platforms", ["tpu,cpu", "cuda", ""])
def test_barriers_are_left_to_what_may_be_there_beside_a_cpu(platforms, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr("flax_vae.runtime.compiler_options.find_spec", lambda name: name == "libtpu")
    order_for_memory()
    assert SCHEDULER_FLAG[0] in os.environ["XLA_FLAGS"]
    assert BARRIER_FLAG[0] not in os.environ["XLA_FLAGS"]


def test_a_jaxlib_that_may_not_know_the_flag_gets_none(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("flax_vae.runtime.compiler_options.version", lambda name: "0.12.0")
    order_for_memory()
    assert os.environ["XLA_FLAGS"] == ""
