"""What a run has measured, a line of JSON a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flax_vae.io.manifest import whole_lines


class MetricsLog:
    """Appends a line a step to a file; lines after the step that a run goes on from are removed first."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = 0
        for line in whole_lines(path):
            if json.loads(line)["step"] >= step:
                break
            kept += len(line)
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by close
        self._file.truncate(kept)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the line of a step, at once."""
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
