"""Checkpoints of a training run: each whole or not there at all; the newest ones and the best are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

CHECKPOINTS = "checkpoints"  # in the folder of a run
QUALITY, STATE = "psnr", "state"
UNKNOWN = -math.inf
SAVED_AS = {"ema": "average", "ema_logits": "usual_logits"}  # fields of a state whose names on disk are older


class Checkpoints:
    """Writes the state of a run while it goes on, and reads the newest; `keep` of them stay, and the best one."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        kept = AnyPreservationPolicy([LatestN(keep), BestN(get_metric_fn=quality_of, n=1)])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=quality_of)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def close(self) -> None:
        """Waits until what was begun is written; raises its error."""
        with self._named():
            self._manager.close()

    def save(self, step: int, state: Any, quality: float = UNKNOWN) -> None:
        """Begins to write a state; an error of the write before this one is raised here.

        `quality` is a PSNR in dB, by which the best one is kept; one of unknown quality is no better than any other.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(named_leaves(state)))
        with self._named():
            self._manager.save(step, args=args, metrics={QUALITY: quality}, force=True)

    def wait(self) -> None:
        """Waits until what was begun is written; raises its error."""
        with self._named():
            self._manager.wait_until_finished()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Has errors of a write say what they mean; tensorstore's are of several kinds, and pages long."""
        try:
            yield
        except Exception as error:
            reason = str(error).split(" [")[0]
            raise OSError(
                f"{self._folder}: a checkpoint could not be written; those before it are whole ({reason})"
            ) from error

    def newest(self) -> int | None:
        """Gives the step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, state: Any) -> Any:
        """Reads the newest checkpoint in the shape of `state`; ValueError where it is of another."""
        names = named_leaves(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(names))
        restored = self._manager.restore(self.newest(), args=args)[STATE]
        return jax.tree.unflatten(jax.tree.structure(state), [restored[name] for name in names])


def restore_part(folder: Path, part: Any, step: Literal["newest", "best"] | int) -> tuple[Any, int]:
    """Reads of a checkpoint what `part` names and nothing else, and gives its step; the run may go on meanwhile.

    Raises FileNotFoundError where there is no such one.
    """
    qualities = qualities_in(folder)
    choices: dict[Any, int | None] = {
        "newest": max(qualities, default=None),
        "best": max(qualities, key=qualities.__getitem__, default=None),
    }
    number = choices.get(step, step)
    if number not in qualities:
        raise FileNotFoundError(f"{folder}: has no checkpoint {step}, but {', '.join(map(str, qualities)) or 'none'}")
    names = named_leaves(part)
    restore_args = ocp.checkpoint_utils.construct_restore_args(names)
    args = ocp.args.PyTreeRestore(names, restore_args=restore_args, partial_restore=True)
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
        folder.absolute() / str(number) / STATE, args=args
    )
    return jax.tree.unflatten(jax.tree.structure(part), [restored[name] for name in names]), number


def qualities_in(folder: Path) -> dict[int, float]:
    """Gives the steps of all whole checkpoints, which alone have a number for a name, and the PSNR of each."""
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    return {step: json.loads((folder / str(step) / "metrics" / "metrics").read_text())[QUALITY] for step in steps}


def quality_of(metrics: dict[str, float]) -> float:
    """Gives that by which checkpoints are compared."""
    return metrics[QUALITY]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their names on disk, as parameters.encoder.conv_in.conv.kernel."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        field, dot, rest = jax.tree_util.keystr(path, simple=True, separator=".").partition(".")
        named[f"{SAVED_AS.get(field, field)}{dot}{rest}"] = leaf
    return named
