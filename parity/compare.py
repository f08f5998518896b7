"""Runs a row of the table in both frameworks with the same weights and inputs, and states how far they are apart.

Every tensor is handed around in torch's layout and by torch's name, as numpy float64.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_vae.io import port
from parity.case import Case

FORWARD, INPUT_GRADIENT, PARAMETER_GRADIENTS = "forward", "input gradient", "parameter gradients"
# How many times torch's own error ours may be in float32 and bfloat16, and the floor, in units in the last place of the
# largest value, below which errors are not told apart. The largest of some hundred errors is a matter of luck, their
# rms is not; a sum of a hundred values, such as a bias's gradient, is off by a unit or two in any order but the best.
LIMITS = {"rms": (2.0, 3.0), "max": (4.0, 8.0)}
# A gradient smaller than this share of the largest one is zero in theory, as that of the bias of attention's keys is;
# what rounding leaves of it is judged by the largest.
ZERO_IN_THEORY = 1e-6
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

Tensors = dict[str, np.ndarray]
Results = dict[str, Tensors]  # part (forward, input gradient, parameter gradients) -> name -> values


class Draw(NamedTuple):
    """What a row is run on: the input, B T H W C, and the weights by torch's names, in torch's layout."""

    x: np.ndarray
    weights: Tensors


@dataclass(frozen=True)
class Error:
    """How far results are from the truth, relative to the largest true value of each tensor."""

    max: float
    rms: float
    eps: float  # of the dtype: the unit in the last place, relative

    def row(self) -> dict[str, float]:
        """Returns what the ledger keeps: the largest error also in units in the last place."""
        return {"max": self.max, "rms": self.rms, "ulp": self.max / self.eps}


def rounded(values: np.ndarray, precision: str) -> np.ndarray:
    """Rounds float64 values to what `precision` can hold, so that no side gains from a better input."""
    return values.astype(jnp.dtype(precision)).astype(np.float64)


def draw(case: Case, precision: str, index: int = 0) -> Draw:
    """Draws the input (B T H W C) and every weight of a row, fresh by its name and index; none of them trivial."""
    rng = np.random.default_rng(zlib.crc32(f"{case.name} {index}".encode()))
    module = case.build_torch()
    weights = {}
    for name, parameter in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
        values = rng.standard_normal(tuple(parameter.shape))
        if values.ndim > 1:
            values /= np.sqrt(values[0].size)
        else:
            values = 0.3 * values + name.endswith("weight")
        weights[name] = rounded(values, precision)
    return Draw(rounded(rng.standard_normal(case.shape), precision), weights)


def cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws what the output of this name is pulled back with; every precision can hold it."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {sorted(shape)}".encode()))
    return rounded(rng.standard_normal(shape), "bfloat16")


def run_torch(case: Case, draw: Draw, dtype: str, device: str = "cpu") -> Results:
    """Runs torch_ref: outputs, and the gradients for `cotangent`."""
    module = case.build_torch()
    if isinstance(module, torch.nn.Module):
        module = module.to(device, DTYPES[dtype]).eval()
        module.load_state_dict({name: torch.from_numpy(value) for name, value in draw.weights.items()})
    parameters = dict(module.named_parameters()) if isinstance(module, torch.nn.Module) else {}
    clip = torch.from_numpy(np.ascontiguousarray(np.moveaxis(draw.x, -1, 1))).to(device, DTYPES[dtype])
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
    module = nnx.eval_shape(case.build_flax) if weights else case.build_flax()
    if weights:
        port.load(module, port.Arrays(weights), dtype)
        module.eval()
    return module


def run_flax(case: Case, draws: Sequence[Draw], dtype: str) -> list[Results]:
    """Runs flax_vae under jit at the highest matmul precision: outputs, and the gradients for `cotangent`."""

    @partial(jax.jit, static_argnums=0)
    def outputs_and_gradients(graph, params, rest, clip):
        def forward(params, clip):
            return case.call_flax(nnx.merge(graph, params, rest), clip)

        if not case.gradients:
            return forward(params, clip), None
        outputs, pull_back = jax.vjp(forward, params, clip)
        return outputs, pull_back({name: pull(name, value) for name, value in outputs.items()})

    every, module = [], ported(case, draws[0].weights, dtype)
    for x, weights in draws:
        if every and weights:
            port.load(module, port.Arrays(weights), dtype)
        with jax.default_matmul_precision("highest"):
            outputs, grads = outputs_and_gradients(*nnx.split(module, nnx.Param, ...), jnp.asarray(x, dtype))
        results = {FORWARD: {name: torch_layout(value) for name, value in outputs.items()}}
        if grads is not None:
            named = port.torch_layout(module, grads[0]) if weights else {}
            results[INPUT_GRADIENT] = {"x": torch_layout(grads[1])}
            results[PARAMETER_GRADIENTS] = {name: value.astype(np.float64) for name, value in named.items()}
        every.append(results)
    return every


def pull(name: str, value: jax.Array) -> jax.Array:
    """Returns the cotangent of a B T H W C output, drawn in torch's axis order."""
    drawn = cotangent(name, torch_shape(value))
    return jnp.asarray(np.moveaxis(drawn, 1, -1) if value.ndim == 5 else drawn, value.dtype)


def torch_shape(value: jax.Array) -> tuple[int, ...]:
    return (value.shape[0], value.shape[4], *value.shape[1:4]) if value.ndim == 5 else value.shape


def torch_layout(value: jax.Array) -> np.ndarray:
    values = np.asarray(value, np.float64)
    return np.moveaxis(values, -1, 1) if values.ndim == 5 else values


@lru_cache(maxsize=1)
def truth(case: Case, precision: str) -> tuple[list[Draw], list[Results]]:
    """Draws a row's inputs and weights, as `precision` holds them, and gives what torch makes of them in float64."""
    draws = [draw(case, precision, index) for index in range(case.draws)]
    return draws, [run_torch(case, drawn, "float64") for drawn in draws]


def measure(actual: Sequence[Results], expected: Sequence[Results], dtype: str) -> dict[str, Error]:
    """Returns the error of each part: of the largest tensor's, and the rms of all tensors'.

    Of a tensor's errors in several draws the largest counts in float64, the geometric mean in float32 and bfloat16.

    Raises:
      AssertionError: other names or shapes than expected, or values that are not finite.
    """
    errors: dict[str, list[list[tuple[float, float]]]] = {}  # part -> draw -> tensor -> largest, rms
    for mine, true in zip(actual, expected, strict=True):
        assert mine.keys() == true.keys(), f"parts {sorted(mine)} instead of {sorted(true)}"
        for part in true:
            errors.setdefault(part, []).append(list(relative_errors(mine[part], true[part], part)))
    eps = float(jnp.finfo(dtype).eps)
    measured = {}
    for part, pairs in errors.items():
        if pairs[0]:
            of_draws = np.array(pairs)
            largest, rms = (of_draws.max(axis=0) if dtype == "float64" else typical(of_draws, eps)).T
            measured[part] = Error(float(largest.max()), float(np.sqrt(np.mean(rms**2))), eps)
    return measured


def typical(errors: np.ndarray, eps: float) -> np.ndarray:
    """Returns the geometric mean over the first axis, that of draws; zeros count as a hundredth of a unit.

    Errors in one precision differ by a hundred times from draw to draw: a sum may come to almost nothing, as that of a
    bias's gradient before a norm, or an activation may fall to the other side of a kink. An rms is then that of one
    draw, and says which framework had the bad luck.
    """
    return np.where(errors.any(axis=0), np.exp(np.log(np.maximum(errors, 0.01 * eps)).mean(axis=0)), 0.0)


def relative_errors(actual: Tensors, expected: Tensors, part: str) -> Iterator[tuple[float, float]]:
    """Yields every tensor's largest and rms error, relative to its largest true value."""
    assert actual.keys() == expected.keys(), f"{part}: names differ: {sorted(actual.keys() ^ expected.keys())}"
    sizes = {name: float(np.abs(value).max()) for name, value in expected.items()}
    for name, value in expected.items():
        assert actual[name].shape == value.shape, f"{part} {name}: shape {actual[name].shape} instead of {value.shape}"
        assert np.isfinite(actual[name]).all(), f"{part} {name}: not finite"
        largest = max(sizes.values())
        scale = (sizes[name] if sizes[name] > ZERO_IN_THEORY * largest else largest) or 1.0
        off = actual[name] - value
        yield float(np.abs(off).max() / scale), float(np.sqrt(np.square(off).mean()) / scale)


def check_same_function(ours: dict[str, Error], tolerance: float) -> None:
    """AssertionError when a part of float64 results is further from the truth than `tolerance`."""
    for part, error in ours.items():
        assert error.max <= tolerance, f"{part}: relative error {error.max:.2e} exceeds {tolerance:.0e}"


def check_no_worse(ours: dict[str, Error], torchs: dict[str, Error]) -> None:
    """AssertionError when a part is further from the truth than `LIMITS` allow, torch being in the same precision."""
    for part, error in ours.items():
        for kind, (times, floor) in LIMITS.items():
            mine, other = (getattr(e, kind) / e.eps for e in (error, torchs[part]))
            limit = max(floor, times * other)
            assert mine <= limit, f"{part}: {kind} error {mine:.2f} ulp, torch {other:.2f}, limit {limit:.2f}"


def ratio(ours: Error, torchs: Error) -> float:
    """Returns our rms error as a multiple of torch's; 1 when neither has any."""
    return ours.rms / torchs.rms if torchs.rms else (1.0 if ours.rms == 0 else float("inf"))
