"""JSON as files hold it."""

import json
import math

import numpy as np
import pytest

from flax_vae.io.files import to_json
from flax_vae.io.manifest import Log, write_lines


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, float(np.float32("nan")), np.float64("inf")])
def test_what_is_not_finite_is_null_wherever_it_is(tmp_path, value):
    tree = {"a": value, "b": [1.5, value, {"c": (value, "nan", None, True)}], "d": 3}
    wanted = {"a": None, "b": [1.5, None, {"c": [None, "nan", None, True]}], "d": 3}
    assert json.loads(to_json(tree), parse_constant=pytest.fail) == wanted
    write_lines(tmp_path / "lines.jsonl", [tree])
    with Log(tmp_path / "log.jsonl", {"settings": value}) as log:
        log.add(tree)
    texts = [*(tmp_path / "lines.jsonl").read_text().splitlines(), *(tmp_path / "log.jsonl").read_text().splitlines()]
    assert [json.loads(text, parse_constant=pytest.fail) for text in texts] == [wanted, {"settings": None}, wanted]
