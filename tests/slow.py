"""Values of a test's parameter, of which some are for the slow suite alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Returns the values in their order, those in `slow` marked as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]
