"""Checkpoints of a training run: each whole or not there at all; the newest ones and the best are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

CHECKPOINTS = "checkpoints"  # in the folder of a run
QUALITY, STATE = "psnr", "state"
UNKNOWN = -math.inf


class Checkpoints:
    """Writes the state of a run while it goes on, and reads any that is whole.

    With `keep`, so many of the newest stay, and the best one; without, nothing is written.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self._folder = folder.absolute()
        policies = [LatestN(keep), BestN(get_metric_fn=quality_of, n=1)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies) if keep else None,
            best_fn=quality_of,
            read_only=keep is None,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def close(self) -> None:
        """Waits until what was begun is written."""
        self._manager.close()

    def save(self, step: int, state: Any, quality: float = UNKNOWN) -> None:
        """Begins to write a state; an error of the write before this one is raised here.

        `quality` is a PSNR in dB, by which the best one is kept; one of unknown quality is no better than any other.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(named_leaves(state)))
        self._manager.save(step, args=args, metrics={QUALITY: quality}, force=True)

    def wait(self) -> None:
        """Waits until what was begun is written; raises its error."""
        self._manager.wait_until_finished()

    def newest(self) -> int | None:
        """Gives the step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Gives the step of the checkpoint of the best quality, None where there is none."""
        return self._manager.best_step()

    def restore(self, state: Any) -> Any:
        """Reads the newest checkpoint in the shape of `state`; ValueError where it is of another."""
        names = named_leaves(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(names))
        restored = self._manager.restore(self.newest(), args=args)[STATE]
        return jax.tree.unflatten(jax.tree.structure(state), [restored[name] for name in names])

    def restore_part(self, part: Any, step: int | None) -> Any:
        """Reads of a checkpoint what `part` names and nothing else; FileNotFoundError where there is no such one."""
        steps = self._manager.all_steps()
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"{self._folder}: has no checkpoint {step}, but {have}")
        names = named_leaves(part)
        args = ocp.args.PyTreeRestore(
            names, restore_args=ocp.checkpoint_utils.construct_restore_args(names), partial_restore=True
        )
        restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(self._folder / str(step) / STATE, args=args)
        return jax.tree.unflatten(jax.tree.structure(part), [restored[name] for name in names])


def quality_of(metrics: dict[str, float]) -> float:
    """Gives that by which checkpoints are compared."""
    return metrics[QUALITY]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Gives the leaves of a tree by their paths, as parameters.encoder.conv_in.conv.kernel."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
