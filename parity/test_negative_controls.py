"""Every check must fail when something is wrong; each known mistake is made on purpose."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity compares with torch")

from parity import compare
from parity.cases import CASES
from parity.mistakes import MISTAKES, UNCLAMPED, Mistake, made

ROW = {case.name: case for case in CASES}
ROW_OF_LAYER = {
    "CausalConv3d": "causal-stride-2",
    "CausalGroupNorm": "norm-4-groups",
    "Attention": "attention",
    "CausalResnetBlock": "resnet-shortcut",
    "SpatialUpsample": "spatial-up",
    "TemporalUpsample": "temporal-up",
    "DiagonalGaussian": "posterior",
}


def check(case_name: str, mistake: Mistake | None, **kwargs) -> None:
    """Runs the float64 check of a row while torch_ref makes a mistake."""
    case = ROW[case_name]
    x, weights = compare.draw_inputs(case, "float32")
    if mistake is None:
        expected = compare.run_torch(case, x, weights, "float64")
    else:
        with made(mistake):
            expected = compare.run_torch(case, x, weights, "float64")
    ours = compare.measure(compare.run_flax(case, x, weights, "float64"), expected, "float64")
    compare.check_same_function(ours, case.tolerance)


@pytest.mark.parametrize("mistake", [*MISTAKES, UNCLAMPED], ids=lambda mistake: mistake.cause.split(":")[0])
def test_float64_check_notices(mistake: Mistake):
    name = ROW_OF_LAYER[mistake.layer.__name__]
    check(name, None)
    with pytest.raises(AssertionError):
        check(name, mistake)


@pytest.mark.parametrize(
    ("name", "axes"), [("causal-3x3x3", (2, 3)), ("causal-3x3x3", (3, 4)), ("resnet", (0, 1)), ("attention", (0, 1))]
)
def test_check_notices_swapped_kernel_axes(name: str, axes: tuple[int, int]):
    case = ROW[name]
    x, weights, expected = compare.truth(case, "float32")
    swapped = {name: value.swapaxes(*axes) if value.ndim > max(axes) else value for name, value in weights.items()}
    ours = compare.measure(compare.run_flax(case, x, swapped, "float64"), expected, "float64")
    with pytest.raises(AssertionError, match="relative error"):
        compare.check_same_function(ours, case.tolerance)


@pytest.mark.parametrize("name", ["causal-3x3x3", "mid-block"])
def test_ratio_check_notices_a_lower_precision(name: str):
    case = ROW[name]
    x, weights, expected = compare.truth(case, "float32")
    torchs = compare.measure(compare.run_torch(case, x, weights, "float32"), expected, "float32")
    rough = {key: compare.rounded(value, "bfloat16") for key, value in weights.items()}
    ours = compare.measure(
        compare.run_flax(case, compare.rounded(x, "bfloat16"), rough, "float32"), expected, "float32"
    )
    with pytest.raises(AssertionError, match="ulp from the truth"):
        compare.check_no_worse(ours, torchs)


@pytest.mark.parametrize("part", [compare.FORWARD, compare.INPUT_GRADIENT, compare.PARAMETER_GRADIENTS])
def test_check_notices_one_wrong_value_in_any_part(part: str):
    case = ROW["resnet-shortcut"]
    *_, expected = compare.truth(case, "float32")
    for name in expected[part]:
        actual = {key: dict(tensors) for key, tensors in expected.items()}
        actual[part][name] = actual[part][name].copy()
        actual[part][name].flat[-1] += 1e-9 * np.abs(actual[part][name]).max()
        with pytest.raises(AssertionError, match=part):
            compare.check_same_function(compare.measure(actual, expected, "float64"), case.tolerance)


@pytest.mark.parametrize(
    "spoil", [lambda v: v * np.nan, lambda v: v[:1], lambda v: v * 0], ids=["not-finite", "shape", "zeros"]
)
def test_check_notices_spoiled_values(spoil):
    case = ROW["resnet"]
    *_, expected = compare.truth(case, "float32")
    actual = expected | {compare.FORWARD: {"y": spoil(expected[compare.FORWARD]["y"])}}
    with pytest.raises(AssertionError):
        compare.check_same_function(compare.measure(actual, expected, "float64"), case.tolerance)


def test_check_notices_a_missing_gradient():
    case = ROW["resnet"]
    *_, expected = compare.truth(case, "float32")
    gradients = dict(expected[compare.PARAMETER_GRADIENTS])
    gradients.pop("norm1.weight")
    with pytest.raises(AssertionError, match=r"names differ.*norm1\.weight"):
        compare.measure(expected | {compare.PARAMETER_GRADIENTS: gradients}, expected, "float64")
