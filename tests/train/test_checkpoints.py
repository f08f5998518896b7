"""Checkpoints of a run: the names of their leaves on disk stay those with which runs were begun, whatever code says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax", reason="checkpoints need orbax")

import orbax.checkpoint as ocp

from flax_vae.train.checkpoints import Checkpoints, restore_part
from flax_vae.train.step import TrainState


@pytest.fixture(autouse=True, scope="module")
def promoting():
    """Lets orbax promote as it does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def state_of(start):
    """Returns a state whose leaves count from `start` on."""
    numbers = iter(range(start, start + 100))

    def kernel():
        return {"conv_out": {"conv": {"kernel": jnp.full((2, 3), next(numbers), jnp.float32)}}}

    return TrainState(
        step=jnp.int32(next(numbers)),
        parameters={"decoder": kernel()},
        ema={"decoder": kernel()},
        optimizer=(jnp.int32(next(numbers)), {"decoder": kernel()}),
        random_counts={},
        discriminator={"main": kernel()},
        discriminator_optimizer=(jnp.int32(next(numbers)), {"main": kernel()}),
        ema_logits=(jnp.float32(next(numbers)), jnp.float32(next(numbers))),
        skipped=jnp.int32(0),
    )


NAMES = {
    "step",
    "parameters.decoder.conv_out.conv.kernel",
    "average.decoder.conv_out.conv.kernel",
    "optimizer.0",
    "optimizer.1.decoder.conv_out.conv.kernel",
    "discriminator.main.conv_out.conv.kernel",
    "discriminator_optimizer.0",
    "discriminator_optimizer.1.main.conv_out.conv.kernel",
    "usual_logits.0",
    "usual_logits.1",
    "skipped",
}


def as_it_was(state):
    """Returns the leaves of a state by the names that the first version gave them."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        named[re.sub(r"^ema_logits\b", "usual_logits", re.sub(r"^ema\b", "average", name))] = leaf
    return named


def equal(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_a_checkpoint_of_the_first_version_is_restored_in_whole_and_in_part(tmp_path):
    state = state_of(7)
    assert as_it_was(state).keys() == NAMES
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["psnr"])
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardSave(as_it_was(state)))
        manager.save(7, args=args, metrics={"psnr": 20.0}, force=True)
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    assert checkpoints.newest() == 7
    assert equal(checkpoints.restore(state_of(50)), state)
    checkpoints.close()
    part, step = restore_part(tmp_path / "run", {"ema": state_of(50).ema}, "best")
    assert (step, equal(part["ema"], state.ema)) == (7, True)


def test_a_checkpoint_is_written_by_the_names_of_the_first_version(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(7, state_of(7), 20.0)
    checkpoints.close()
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        written = manager.restore(7, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    assert written.keys() == NAMES
    assert equal(written["average.decoder.conv_out.conv.kernel"], state_of(7).ema)


@pytest.mark.parametrize(("step", "message"), [(3, "no checkpoint 3, but 7"), ("best", "no checkpoint best, but none")])
def test_a_checkpoint_that_is_not_there_is_named_with_those_there_are(tmp_path, step, message):
    if step == 3:
        checkpoints = Checkpoints(tmp_path / "run", keep=1)
        checkpoints.save(7, state_of(7))
        checkpoints.close()
    with pytest.raises(FileNotFoundError, match=message):
        restore_part(tmp_path / "run", {"ema": state_of(7).ema}, step)
