"""A clip encoded and decoded in chunks by flax_vae equals the whole clip in torch_ref."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity compares with torch")

from parity import compare
from parity.cases import CASES, MODEL_TOLERANCE

CASE = next(case for case in CASES if case.name == "vae-shallow")
PLANS = [(5,), (1, 4), (3, 2), (1, 2, 2), (1, 1, 1, 1, 1)]


def in_chunks(step, x: jax.Array, plan: tuple[int, ...], carry=None) -> tuple[list, object]:
    """Gives what each chunk of the plan yields, and the last carry."""
    results, start = [], 0
    for frames in plan:
        result, carry = step(x[:, start : start + frames], carry)
        results.append(result)
        start += frames
    return results, carry


def encoded_and_decoded(plan: tuple[int, ...], spoil=lambda carry: carry):
    """Gives torch_ref's whole mean and video, and ours in chunks; `spoil` changes the carry between chunks."""
    draws, results = compare.truth(CASE, "float32")
    vae, expected = compare.ported(CASE, draws[0].weights, "float64"), results[0][compare.FORWARD]

    def spoiled(step):
        return lambda chunk, carry: step(chunk, None if carry is None else spoil(carry))

    chunks, _ = in_chunks(spoiled(vae.encode_chunk), jnp.asarray(draws[0].x), plan)
    mean = jnp.concatenate([posterior.mean for posterior in chunks], axis=1)
    video, _ = in_chunks(spoiled(vae.decode_chunk), mean, (1,) * mean.shape[1])
    ours = {"mean": compare.torch_layout(mean), "video": compare.torch_layout(jnp.concatenate(video, axis=1))}
    return ours, expected


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_clip_in_chunks_equals_torchs_whole_clip(plan: tuple[int, ...]):
    ours, expected = encoded_and_decoded(plan)
    for name, value in ours.items():
        assert value.shape == expected[name].shape
        assert np.abs(value - expected[name]).max() <= MODEL_TOLERANCE * np.abs(expected[name]).max()


def test_a_forgotten_carry_is_noticed():
    ours, expected = encoded_and_decoded((3, 2), spoil=lambda carry: jax.tree.map(jnp.zeros_like, carry))
    assert np.abs(ours["mean"] - expected["mean"]).max() > 1e-3 * np.abs(expected["mean"]).max()
