"""Every check must fail when something is wrong; each known mistake is made on purpose."""

from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity compares with torch")

from parity import compare
from parity.mistakes import BESIDE_LAYERS, MISTAKES, Mistake, made
from parity.rows import CASES

ROW = {case.name: case for case in CASES}
ROW_OF_LAYER = {
    "CausalConv3d": "causal-stride-2",
    "CausalGroupNorm": "norm-4-groups",
    "Attention": "attention",
    "CausalResnetBlock": "resnet-shortcut",
    "SpatialUpsample": "spatial-up",
    "TemporalUpsample": "temporal-up",
    "DiagonalGaussian": "posterior",
    "LossyTiling": "tiles-up-last-merged",
}


@lru_cache
def ours(name: str) -> tuple[compare.Draw, list[compare.Results]]:
    """Draws a row once, and returns what flax_vae makes of it in float64."""
    draw = compare.draw(ROW[name], "float32")
    return draw, compare.run_flax(ROW[name], [draw], "float64")


def check(name: str, mistake: Mistake | None) -> None:
    """Runs the float64 check of a row while torch_ref makes a mistake."""
    case, (draw, results) = ROW[name], ours(name)
    with made(mistake) if mistake else nullcontext():
        expected = compare.run_torch(case, draw, "float64")
    compare.check_same_function(compare.measure(results, [expected], "float64"), case.tolerance)


@lru_cache
def right(name: str) -> list[compare.Results]:
    """Returns the true results of a row's draws."""
    return compare.truth(ROW[name], "float32")[1]


@pytest.mark.parametrize("mistake", [*MISTAKES, *BESIDE_LAYERS], ids=lambda mistake: mistake.cause.split(":")[0])
def test_float64_check_notices(mistake: Mistake):
    name = ROW_OF_LAYER[mistake.layer.__name__]
    check(name, None)
    with pytest.raises(AssertionError):
        check(name, mistake)


@pytest.mark.parametrize(
    ("name", "axes"), [("causal-3x3x3", (2, 3)), ("causal-3x3x3", (3, 4)), ("resnet", (0, 1)), ("attention", (0, 1))]
)
def test_check_notices_swapped_kernel_axes(name: str, axes: tuple[int, int]):
    draws, expected = compare.truth(ROW[name], "float32")
    swapped = [
        draw._replace(weights={key: w.swapaxes(*axes) if w.ndim > max(axes) else w for key, w in draw.weights.items()})
        for draw in draws
    ]
    found = compare.measure(compare.run_flax(ROW[name], swapped, "float64"), expected, "float64")
    with pytest.raises(AssertionError, match="relative error"):
        compare.check_same_function(found, ROW[name].tolerance)


@pytest.mark.parametrize("name", ["causal-3x3x3", "mid-block"])
def test_ratio_check_notices_a_lower_precision(name: str):
    draws, expected = compare.truth(ROW[name], "float32")
    torchs = compare.measure([compare.run_torch(ROW[name], draw, "float32") for draw in draws], expected, "float32")
    rough = [compare.draw(ROW[name], "bfloat16", index) for index in range(len(draws))]
    found = compare.measure(compare.run_flax(ROW[name], rough, "float32"), expected, "float32")
    with pytest.raises(AssertionError, match="rms error"):
        compare.check_no_worse(found, torchs)


def with_part(results: list[compare.Results], part: str, tensors: compare.Tensors) -> list[compare.Results]:
    """Returns results in which one part of the first draw is another."""
    return [results[0] | {part: tensors}, *results[1:]]


@pytest.mark.parametrize("part", [compare.FORWARD, compare.INPUT_GRADIENT, compare.PARAMETER_GRADIENTS])
def test_check_notices_one_wrong_value_in_any_part(part: str):
    expected = right("resnet-shortcut")
    for name, value in expected[0][part].items():
        wrong = value.copy()
        wrong.flat[-1] += 1e-9 * np.abs(value).max()
        actual = with_part(expected, part, expected[0][part] | {name: wrong})
        with pytest.raises(AssertionError, match=part):
            compare.check_same_function(compare.measure(actual, expected, "float64"), 1e-12)


@pytest.mark.parametrize(
    "spoil", [lambda v: v * np.nan, lambda v: v[:1], lambda v: v * 0], ids=["not-finite", "shape", "zeros"]
)
def test_check_notices_spoiled_values(spoil):
    expected = right("resnet")
    actual = with_part(expected, compare.FORWARD, {"y": spoil(expected[0][compare.FORWARD]["y"])})
    with pytest.raises(AssertionError):
        compare.check_same_function(compare.measure(actual, expected, "float64"), 1e-12)


def test_check_notices_a_missing_gradient():
    expected = right("resnet")
    gradients = dict(expected[0][compare.PARAMETER_GRADIENTS])
    gradients.pop("norm1.weight")
    with pytest.raises(AssertionError, match=r"names differ.*norm1\.weight"):
        compare.measure(with_part(expected, compare.PARAMETER_GRADIENTS, gradients), expected, "float64")
