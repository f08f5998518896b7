"""Runs a row of the table in both frameworks with the same weights and inputs, and states how far they are apart.

Every tensor is handed around in torch's layout and by torch's name, as numpy float64.
"""

import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_vae.io import port
from parity.cases import Case

FORWARD, INPUT_GRADIENT, PARAMETER_GRADIENTS = "forward", "input gradient", "parameter gradients"
FLOOR_ULP = 4  # float32 and bfloat16 errors below this many units in the last place are not told apart
RATIO_LIMIT = 2.0  # ours may be this many times torch's own error
# A parameter's gradient is judged by its own size, or by this share of the largest one: some are zero in theory.
SMALL_GRADIENT = 1e-2
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

Tensors = dict[str, np.ndarray]
Results = dict[str, Tensors]  # part (forward, input gradient, parameter gradients) -> name -> values


@dataclass(frozen=True)
class Error:
    """How far results are from the truth, relative to the largest true value: worst tensor of a part."""

    max: float
    rms: float
    ulp: float

    def row(self) -> dict[str, float]:
        return asdict(self)


def rounded(values: np.ndarray, precision: str) -> np.ndarray:
    """Rounds float64 values to what `precision` can hold, so that no side gains from a better input."""
    return values.astype(jnp.dtype(precision)).astype(np.float64)


def draw_inputs(case: Case, precision: str) -> tuple[np.ndarray, Tensors]:
    """Draws the input (B T H W C) and every weight of a row, fresh by its name; none of them trivial."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    module = case.torch()
    weights = {}
    for name, parameter in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
        values = rng.standard_normal(tuple(parameter.shape))
        if values.ndim > 1:
            values /= np.sqrt(values[0].size)
        else:
            values = 0.3 * values + name.endswith("weight")
        weights[name] = rounded(values, precision)
    return rounded(rng.standard_normal(case.shape), precision), weights


def cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws what the output of this name is pulled back with; every precision can hold it."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {sorted(shape)}".encode()))
    return rounded(rng.standard_normal(shape), "bfloat16")


def run_torch(case: Case, x: np.ndarray, weights: Tensors, dtype: str, device: str = "cpu") -> Results:
    """Runs torch_ref: outputs, and the gradients for `cotangent`."""
    module = case.torch()
    if isinstance(module, torch.nn.Module):
        module = module.to(device, DTYPES[dtype]).eval()
        module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    parameters = dict(module.named_parameters()) if isinstance(module, torch.nn.Module) else {}
    clip = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(device, DTYPES[dtype])
    clip.requires_grad_(case.gradients)
    with torch.set_grad_enabled(case.gradients):
        outputs = case.call_torch(module, clip)
    results = {FORWARD: {name: to_numpy(value) for name, value in outputs.items()}}
    if not case.gradients:
        return results
    pulls = [torch.from_numpy(cotangent(name, tuple(value.shape))).to(value) for name, value in outputs.items()]
    grads = torch.autograd.grad(list(outputs.values()), [clip, *parameters.values()], pulls)
    results[INPUT_GRADIENT] = {"x": to_numpy(grads[0])}
    results[PARAMETER_GRADIENTS] = dict(zip(parameters, map(to_numpy, grads[1:]), strict=True))
    return results


def to_numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()


def ported(case: Case, weights: Tensors, dtype: str):
    """Builds our side of a row with torch's weights, carried over by the port that users run."""
    module = case.flax()
    if weights:
        port.load(module, port.Arrays(weights), dtype)
        module.eval()
    return module


def run_flax(case: Case, x: np.ndarray, weights: Tensors, dtype: str) -> Results:
    """Runs flax_vae under jit at the highest matmul precision: outputs, and the gradients for `cotangent`."""
    module = ported(case, weights, dtype)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params, clip):
        return case.call_flax(nnx.merge(graph, params, rest), clip)

    @jax.jit
    def outputs_and_gradients(params, clip):
        if not case.gradients:
            return forward(params, clip), None
        outputs, pull_back = jax.vjp(forward, params, clip)
        return outputs, pull_back({name: pull(name, value) for name, value in outputs.items()})

    with jax.default_matmul_precision("highest"):
        outputs, grads = outputs_and_gradients(params, jnp.asarray(x, dtype))
    results = {FORWARD: {name: torch_layout(value) for name, value in outputs.items()}}
    if grads is not None:
        results[INPUT_GRADIENT] = {"x": torch_layout(grads[1])}
        named = port.torch_layout(module, grads[0]) if weights else {}
        results[PARAMETER_GRADIENTS] = {name: value.astype(np.float64) for name, value in named.items()}
    return results


def pull(name: str, value: jax.Array) -> jax.Array:
    """Gives the cotangent of a B T H W C output, drawn in torch's axis order."""
    drawn = cotangent(name, torch_shape(value))
    return jnp.asarray(np.moveaxis(drawn, 1, -1) if value.ndim == 5 else drawn, value.dtype)


def torch_shape(value: jax.Array) -> tuple[int, ...]:
    return (value.shape[0], value.shape[4], *value.shape[1:4]) if value.ndim == 5 else value.shape


def torch_layout(value: jax.Array) -> np.ndarray:
    values = np.asarray(value, np.float64)
    return np.moveaxis(values, -1, 1) if values.ndim == 5 else values


@lru_cache(maxsize=2)
def truth(case: Case, precision: str) -> tuple[np.ndarray, Tensors, Results]:
    """Gives the input and weights of a row, as `precision` holds them, and what torch makes of them in float64."""
    x, weights = draw_inputs(case, precision)
    return x, weights, run_torch(case, x, weights, "float64")


def measure(actual: Results, expected: Results, dtype: str) -> dict[str, Error]:
    """Gives the error of each part; AssertionError where names or shapes differ or a value is not finite."""
    assert actual.keys() == expected.keys(), f"parts {sorted(actual)} instead of {sorted(expected)}"
    return {part: measure_part(actual[part], expected[part], part, dtype) for part in actual if expected[part]}


def measure_part(actual: Tensors, expected: Tensors, part: str, dtype: str) -> Error:
    assert actual.keys() == expected.keys(), f"{part}: names differ: {sorted(actual.keys() ^ expected.keys())}"
    largest = max(np.abs(value).max() for value in expected.values())
    smallest = SMALL_GRADIENT * largest if part == PARAMETER_GRADIENTS else np.finfo(np.float64).tiny
    worst_max = worst_rms = 0.0
    for name, value in expected.items():
        assert actual[name].shape == value.shape, f"{part} {name}: shape {actual[name].shape} instead of {value.shape}"
        assert np.isfinite(actual[name]).all(), f"{part} {name}: not finite"
        off, scale = actual[name] - value, max(np.abs(value).max(), smallest)
        worst_max = max(worst_max, float(np.abs(off).max() / scale))
        worst_rms = max(worst_rms, float(np.sqrt(np.square(off).mean()) / scale))
    return Error(worst_max, worst_rms, worst_max / float(jnp.finfo(dtype).eps))


def check_same_function(ours: dict[str, Error], tolerance: float) -> None:
    """AssertionError when a part of float64 results is further from the truth than `tolerance`."""
    for part, error in ours.items():
        assert error.max <= tolerance, f"{part}: relative error {error.max:.2e} exceeds {tolerance:.0e}"


def check_no_worse(ours: dict[str, Error], torchs: dict[str, Error]) -> None:
    """AssertionError when a part is more than twice as far from the truth as torch is in the same precision."""
    for part, error in ours.items():
        limit = max(FLOOR_ULP, RATIO_LIMIT * torchs[part].ulp)
        assert error.ulp <= limit, (
            f"{part}: {error.ulp:.1f} ulp from the truth, torch {torchs[part].ulp:.1f}, limit {limit:.1f}"
        )


def ratio(ours: Error, torchs: Error) -> float:
    """Gives our rms error as a multiple of torch's; 1 when neither has any."""
    return ours.rms / torchs.rms if torchs.rms else (1.0 if ours.rms == 0 else float("inf"))
