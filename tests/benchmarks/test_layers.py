"""The benchmark of convolutions one by one: it lists those of the model, and both frameworks compute the same."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from benchmarks.convolutions import PARTS, Convolution, Part, convolutions_of, ready_part
from benchmarks.layers import Timed, draw, table
from benchmarks.speed import OURS
from benchmarks.subjects import config
from flax_vae.families import registry
from flax_vae.layers.conv import Conv3d

STRIDED = Convolution(
    (1, 3, 6, 5, 4), (3, 3, 3, 4, 6), (1, 3, 3, 3, 6), (1, 2, 2), ((2, 0), (1, 1), (1, 1)), needs_input_gradient=True
)


def test_every_convolution_of_the_model_is_listed():
    found = convolutions_of("tiny", 9, 32)
    vae = registry.abstract(config("tiny"))
    kernels = [module.kernel.shape for _, module in nnx.iter_graph(vae) if isinstance(module, Conv3d)]
    assert sorted(each.kernel for each in found) == sorted(kernels)
    assert found[0].clip == (1, 9, 32, 32, 3)
    assert not found[0].needs_input_gradient
    assert found[-1].outputs == (1, 9, 32, 32, 3)
    assert all(each.needs_input_gradient for each in found[1:])


@pytest.mark.parametrize("layout", ["eager", "channels_last_3d"])
@pytest.mark.parametrize("part", PARTS)
def test_both_frameworks_compute_the_same(part, layout):
    described = {"clip": [1, 3, 6, 5, 4], "kernel": [3, 3, 3, 4, 6], "outputs": [1, 3, 3, 3, 6]}
    described |= {"stride": [1, 2, 2], "padding": [[2, 0], [1, 1], [1, 1]], "needs_input_gradient": True}
    assert Convolution.read(described) == STRIDED
    ours, theirs = (ready_part(way, STRIDED, part, "cpu", "float32")() for way in (OURS, layout))
    theirs = theirs.numpy().transpose((2, 3, 4, 1, 0) if part == "by kernel" else (0, 2, 3, 4, 1))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_table_adds_up_what_all_of_a_kind_take(tmp_path):
    one = {OURS: 0.002, "eager": 0.001, "channels_last_3d": 0.004}
    seconds: dict[Part, dict[str, float]] = dict.fromkeys(PARTS, one)
    first = replace(STRIDED, needs_input_gradient=False)
    found = [Timed(STRIDED, 3, seconds), Timed(first, 1, {part: seconds[part] for part in first.parts})]
    told = table(found, {OURS: 0.03, "eager": 0.02, "channels_last_3d": 0.025})
    assert "| 3x6x5, 4 to 6, 3x3x3 / 1x2x2 | 3 | 6 / 3 | 6 / 3 | 6 / 3 | +9 |" in told
    assert "| 3x6x5, 4 to 6, 3x3x3 / 1x2x2 | 1 | 2 / 1 | - | 2 / 1 | +2 |" in told
    assert "| all | 4 | 8 / 4 | 6 / 3 | 8 / 4 | +11 |" in told
    assert told.endswith("convolutions: 22 / 11 ms; rest: 8 / 9 ms; the gradient as a whole: 30 / 20 ms")
    draw(found, "two", tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000
