"""Checkpoints of a training run: each whole or not there at all; the newest ones and the best are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

QUALITY = "psnr"


class Checkpoints:
    """Writes the state of a run while it goes on, and reads the newest one that is whole."""

    def __init__(self, folder: Path, keep: int):
        policies = [
            LatestN(keep),
            BestN(get_metric_fn=lambda metrics: metrics[QUALITY], n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies))
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def close(self) -> None:
        """Waits until what was begun is written."""
        self._manager.close()

    def save(self, step: int, state: Any, about: dict[str, Any], quality: float | None = None) -> None:
        """Begins to write a state and what JSON says `about` it; an error of the write before this one is raised here.

        `quality` is a PSNR in dB, by which the best one is kept.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(named_leaves(state)), about=ocp.args.JsonSave(about))
        self._manager.save(step, args=args, metrics=None if quality is None else {QUALITY: quality}, force=True)

    def wait(self) -> None:
        """Waits until what was begun is written; raises its error."""
        self._manager.wait_until_finished()

    def newest(self) -> int | None:
        """Gives the step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint, by default the newest, into the shape of `state`; gives it and what was said about it.

        Raises ValueError where it is of another shape.
        """
        step = self.newest() if step is None else step
        names = named_leaves(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(names), about=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        leaves = [restored["state"][name] for name in names]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), restored["about"]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Gives the leaves of a tree by their paths, as parameters.encoder.conv_in.conv.kernel."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
