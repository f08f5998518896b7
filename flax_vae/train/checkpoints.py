"""Checkpoints of a training run, each complete or absent; the newest ones and the best are kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from flax_vae.io.files import read_json

CHECKPOINTS = "checkpoints"  # in the folder of a run
QUALITY, STATE = "psnr", "state"
UNKNOWN_QUALITY = -math.inf
SAVED_AS = {"ema": "average", "ema_logits": "usual_logits"}  # fields of a state that had other names, kept on disk


class Checkpoints:
    """Writes the state of a run while it goes on, and reads the newest; `keep` of them stay, and the best one."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        quality_of = itemgetter(QUALITY)
        kept = AnyPreservationPolicy([LatestN(keep), BestN(get_metric_fn=quality_of, n=1)])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=quality_of)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def close(self) -> None:
        """Waits until all writes are done; raises their error."""
        with self._named():
            self._manager.close()

    def save(self, step: int, state: Any, quality: float = UNKNOWN_QUALITY) -> None:
        """Starts to write a state; raises the error of the write before.

        The best one is kept by `quality`, a PSNR in dB; one of unknown quality is no better than any other.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(named_leaves(state)))
        with self._named():
            self._manager.save(step, args=args, metrics={QUALITY: quality}, force=True)

    def wait(self) -> None:
        """Waits until all writes are done; raises their error."""
        with self._named():
            self._manager.wait_until_finished()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raises errors of a write as one OSError; tensorstore's are of several classes, and pages long."""
        try:
            yield
        except Exception as error:
            reason = str(error).split(" [")[0]
            failed = f"{self._folder}: a checkpoint could not be written; those before it are whole ({reason})"
            raise OSError(failed) from error

    def newest(self) -> int | None:
        """Returns the step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, state: Any) -> Any:
        """Reads the newest checkpoint in the shapes and shardings of `state`; ValueError where it has others."""
        names = named_leaves(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(names))
        restored = self._manager.restore(self.newest(), args=args)[STATE]
        return jax.tree.unflatten(jax.tree.structure(state), [restored[name] for name in names])


def restore_part(folder: Path, part: Any, step: Literal["newest", "best"] | int) -> tuple[Any, int]:
    """Reads only the leaves of `part`, a part of a state, and returns them with the step of their checkpoint.

    The run may go on meanwhile. Raises FileNotFoundError where there is no such checkpoint.
    """
    qualities = qualities_in(folder)
    newest, best = max(qualities, default=None), max(qualities, key=qualities.__getitem__, default=None)
    number = newest if step == "newest" else best if step == "best" else step
    if number not in qualities:
        raise FileNotFoundError(f"{folder}: has no checkpoint {step}, but {', '.join(map(str, qualities)) or 'none'}")
    names = named_leaves(part)
    restore_args = ocp.checkpoint_utils.construct_restore_args(names)
    args = ocp.args.PyTreeRestore(names, restore_args=restore_args, partial_restore=True)
    path = folder.absolute() / str(number) / STATE
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(path, args=args)
    return jax.tree.unflatten(jax.tree.structure(part), [restored[name] for name in names]), number


def qualities_in(folder: Path) -> dict[int, float]:
    """Returns the PSNR of each complete checkpoint by its step; only the folders of these have a number for a name."""
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    return {step: read_json(folder / str(step) / "metrics" / "metrics")[QUALITY] for step in steps}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their names on disk, as parameters.encoder.conv_in.conv.kernel."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        field, dot, rest = jax.tree_util.keystr(path, simple=True, separator=".").partition(".")
        named[f"{SAVED_AS.get(field, field)}{dot}{rest}"] = leaf
    return named
