"""Options, precision and ledger of the parity suite."""

import contextlib
import json
import os

import pytest

from tests.resources import alone, bounded, share  # noqa: F401

share()

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def pytest_addoption(parser):
    group = parser.getgroup("parity")
    group.addoption("--device", choices=sorted(PLATFORMS), default="cpu", help="where flax_vae runs (default: cpu)")
    group.addoption("--ledger", metavar="PATH", help="write every measured error to this JSON file")


def pytest_configure(config):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch and other processes share a gpu's memory
    with contextlib.suppress(ImportError):  # without jax the tests skip, with a reason
        import jax

        jax.config.update("jax_platforms", PLATFORMS[config.getoption("device")])


@pytest.fixture(autouse=True)
def double_precision():
    """Lets float64 be float64; the dtype of every array in the suite is explicit."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def torch_device(request) -> str:
    """Where torch runs: beside flax_vae where it can, else on the CPU; never with TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return "cuda" if request.config.getoption("device") == "gpu" and torch.cuda.is_available() else "cpu"


def pytest_terminal_summary(terminalreporter, config):
    from flax_vae.io.files import replacing
    from parity import ledger

    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [row for report in reports for name, row in report.user_properties if name == "parity"]
    if not rows:
        return
    from parity.rows import CASES

    places = {case.name: place for place, case in enumerate(CASES)}
    rows.sort(key=lambda row: places[row["case"]])  # several processes report in any order
    terminalreporter.section("parity ledger")
    for line in ledger.summary(rows):
        terminalreporter.write_line(line)
    if path := config.getoption("ledger"):
        record = {"device": ledger.device_name(config.getoption("device")), "versions": ledger.versions(), "rows": rows}
        with replacing(path) as part:
            part.write_text(json.dumps(record, indent=1))
        terminalreporter.write_line(f"written to {path}")
