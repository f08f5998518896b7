"""Every row of the table: the same function in float64, and no worse than torch in float32 and bfloat16."""

import pytest

pytest.importorskip("torch", reason="parity compares with torch")

from parity import compare
from parity.case import FEW_DRAWS, Case
from parity.rows import CASES


def row(case: Case, is_slow: bool):
    """Returns a test's parameter."""
    marks = [pytest.mark.slow] * is_slow + [pytest.mark.large] * case.large
    return pytest.param(case, id=case.name, marks=marks)


ROWS = [row(case, case.slow) for case in CASES]
ROUNDED_ROWS = [row(case, case.slow or case.slow_rounded) for case in CASES]


@pytest.fixture(autouse=True)
def forgotten(request):
    """Keeps no large row in memory for tests to come."""
    yield
    if request.node.get_closest_marker("large"):
        compare.truth.cache_clear()


def record(record_property, case: Case, dtype: str, ours, torchs=None) -> None:
    """Puts a row's errors into the ledger."""
    for part, error in ours.items():
        against = {"torch": torchs[part].row(), "ratio": compare.ratio(error, torchs[part])} if torchs else {}
        record_property("parity", {"case": case.name, "dtype": dtype, "part": part, **error.row(), **against})


@pytest.mark.parametrize("case", ROWS)
def test_same_function_in_float64(case: Case, record_property, request):
    if request.config.getoption("device") == "tpu":
        pytest.skip("TPUs have no float64 convolutions")
    draws, expected = compare.truth(case, "float32")
    ours = compare.run_flax(case, draws[:FEW_DRAWS], "float64")
    ours = compare.measure(ours, expected[:FEW_DRAWS], "float64")
    record(record_property, case, "float64", ours)
    compare.check_same_function(ours, case.tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ROUNDED_ROWS)
def test_no_worse_than_torch(case: Case, dtype: str, record_property, torch_device):
    draws, expected = compare.truth(case, dtype)
    ours = compare.measure(compare.run_flax(case, draws, dtype), expected, dtype)
    torchs = [compare.run_torch(case, draw, dtype, torch_device) for draw in draws]
    torchs = compare.measure(torchs, expected, dtype)
    record(record_property, case, dtype, ours, torchs)
    compare.check_no_worse(ours, torchs)
