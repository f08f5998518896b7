"""The log of a run: a line of JSON a step, and the same for TensorBoard where tensorboardX is installed."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from flax_vae.io.files import to_json
from flax_vae.io.manifest import whole_lines

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"  # in the folder of a run


class MetricsLog:
    """Appends a line a step to the metrics in a folder; lines from `step` on, where the run continues, are removed."""

    def __init__(self, folder: Path, step: int):
        path, kept = folder / METRICS, 0
        for line in whole_lines(path):
            if json.loads(line)["step"] >= step:
                break
            kept += len(line)
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by close
        self._file.truncate(kept)
        self._board = None
        with contextlib.suppress(ImportError):
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the line of a step at once; what is not finite is null."""
        self._file.write(to_json({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
