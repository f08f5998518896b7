"""A clip in chunks in flax_vae, as streams and in one program, equals the whole clip in torch_ref.

A plan is the number of latents of every chunk.
"""

from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity compares with torch")

from flax_vae.runtime import stream
from parity import compare
from parity.case import MODEL_TOLERANCE
from parity.rows import CASES
from parity.rows.pyramid import SHALLOW
from tests.resources import compiled_fast

CASE = next(case for case in CASES if case.name == "vae-shallow")
SINGLE = (1, 1, 1)


@pytest.fixture(scope="module", autouse=True)
def fast_and_exact(request):
    """Has streams compiled fast, and convolutions in their full precision."""
    if request.config.getoption("device") == "tpu":
        pytest.skip("TPUs have no float64 convolutions")
    with compiled_fast(), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def vae():
    """Our model with the weights of the row, in float64."""
    return compare.ported(CASE, draw().weights, "float64")


def draw() -> compare.Draw:
    return compare.truth(CASE, "float32")[0][0]


def clip() -> jax.Array:
    return jnp.asarray(draw().x)


def count(latents: int) -> int:
    return SHALLOW.temporal_factor * (latents - 1) + 1 if latents else 0


def cut(x: jax.Array, plan: tuple[int, ...], frames: bool) -> list[jax.Array]:
    ends = [count(end) if frames else end for end in accumulate(plan, initial=0)]
    return [x[:, start:end] for start, end in pairwise(ends)]


def check(name: str, ours: list) -> None:
    """AssertionError unless results, joined in time, are what torch makes of the whole clip."""
    value = compare.torch_layout(jnp.concatenate(ours, axis=1))
    true = compare.truth(CASE, "float32")[1][0][compare.FORWARD][name]
    assert value.shape == true.shape, f"{name}: shape {value.shape} instead of {true.shape}"
    error = np.abs(value - true).max() / np.abs(true).max()
    assert error <= MODEL_TOLERANCE, f"{name}: relative error {error:.2e} exceeds {MODEL_TOLERANCE:.0e}"


@pytest.mark.parametrize(
    "plan", [(1, 2), *(pytest.param(plan, marks=pytest.mark.slow) for plan in ((3,), SINGLE))], ids=str
)
def test_streams_equal_torchs_whole_clip(vae, plan: tuple[int, ...]):
    means = [posterior.mean for posterior in stream.encode(vae, cut(clip(), plan, frames=True))]
    check("mean", means)
    check("video", list(stream.decode(vae, means)))


def test_chunks_in_one_program_equal_torchs_whole_clip(vae):
    mean = vae.encode(clip(), chunk=SHALLOW.temporal_factor).mean
    check("mean", [mean])
    check("video", [vae.decode(mean, chunk=1)])


def run(vae, name: str, spoil, order: tuple[int, ...] = (0, 1, 2)) -> list:
    """Encodes or decodes one latent after the other, with what `spoil` makes of the carries so far."""
    whole = next(stream.encode(vae, [clip()])).mean if name == "video" else None
    step = stream.compiled(vae.encode_chunk if name == "mean" else vae.decode_chunk)
    pieces = cut(clip() if whole is None else whole, SINGLE, frames=whole is None)
    carries: list = []
    results = []
    for i in order:
        result, carry = step(pieces[i], spoil(carries))
        results.append(result.mean if name == "mean" else result)
        carries.append(carry)
    return results


def right(carries: list):
    return carries[-1] if carries else None


def zeros(carries: list):
    return jax.tree.map(jnp.zeros_like, right(carries))


def stale(carries: list):
    return carries[-2] if len(carries) > 1 else right(carries)


def shifted(carries: list):
    return jax.tree.map(lambda frames: jnp.roll(frames, 1, axis=1), right(carries))


@pytest.mark.parametrize("name", ["mean", "video"])
@pytest.mark.parametrize(
    "spoil", [pytest.param(zeros, marks=pytest.mark.slow), pytest.param(stale, marks=pytest.mark.slow), shifted]
)
def test_a_wrong_carry_is_noticed(vae, name: str, spoil):
    check(name, run(vae, name, right))
    with pytest.raises(AssertionError, match="relative error"):
        check(name, run(vae, name, spoil))


def test_swapped_chunks_are_noticed(vae):
    with pytest.raises(AssertionError, match="relative error"):
        check("video", run(vae, "video", right, order=(0, 2, 1)))


def test_a_first_frame_that_is_not_dropped_is_noticed(vae):
    def never_started(carries: list):
        return carries[-1] if carries else blank

    blank = jax.tree.map(jnp.zeros_like, stream.compiled(vae.decode_chunk)(jnp.zeros((2, 1, 4, 3, 3)), None)[1])
    frames = run(vae, "video", never_started)
    with pytest.raises(AssertionError, match="shape"):
        check("video", frames)
    with pytest.raises(AssertionError, match="relative error"):
        check("video", [frames[0][:, 1:], *frames[1:]])
