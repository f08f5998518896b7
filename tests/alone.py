"""For both suites: tests that take so much memory that two of them would not fit run one at a time."""

import filelock
import pytest


@pytest.fixture(autouse=True)
def alone(request, tmp_path_factory):
    """Waits, before a test that is marked as large, until no other process of this run is at one."""
    if request.node.get_closest_marker("large") is None:
        yield
        return
    with filelock.FileLock(tmp_path_factory.getbasetemp().parent / "large.lock"):
        yield
