"""Starts workers, watches over them, and counts what comes of the inputs."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutations import make_input
from tests.fuzz.samples import Sample, read_samples

PATIENCE = 20  # seconds that one input may take
START = 240  # seconds that a worker may take to start
GOOD = ("read", "refused")
READERS = "tests.fuzz.readers:READERS"


@dataclass
class Result:
    """The number of inputs by kind and outcome, and (number, kind, outcome, message) of every failure."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[tuple[int, str, str, str]] = field(default_factory=list)


class Worker:
    """A process that reads every N-th input; where it ends or hangs, the next one goes on behind that input."""

    def __init__(self, folder: Path, samples: Path, seed: int, first: int, step: int, readers: str):
        self.folder, self.next, self._step = folder, first, step
        self._command = [sys.executable, "-m", "tests.fuzz.worker", str(samples), readers, str(seed)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.start()

    def start(self) -> None:
        """Starts a process from the next input on."""
        root = Path(__file__).parents[2]
        env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
        command = [*self._command, str(self.next), str(self._step), str(self.folder)]
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "cwd": root, "env": env}
        self.process, self._rest = subprocess.Popen(command, **settings, start_new_session=True), b""
        self._is_ready, self.deadline = False, time.monotonic() + START

    @property
    def output(self) -> int:
        """The descriptor that the answers come from."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def answers(self) -> list[tuple[int, str, str]]:
        """Returns what has come of the inputs by now, also of one that has ended or stopped the process."""
        descriptor, found = self.output, []
        while select.select([descriptor], [], [], 0)[0]:
            if not (part := os.read(descriptor, 1 << 16)):
                code = self.process.wait()
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return [*found, self.ended("crash", name)]
            *lines, self._rest = (self._rest + part).split(b"\n")
            for answer in map(json.loads, lines):
                self._is_ready, self.deadline = True, time.monotonic() + PATIENCE
                if answer is not None:
                    found.append(tuple(answer))
                    self.next = answer[0] + self._step
        if time.monotonic() > self.deadline:
            return [*found, self.ended("hang", f"no answer in {PATIENCE} s")]
        return found

    def ended(self, outcome: str, message: str) -> tuple[int, str, str]:
        """Starts the next process behind the input that this one ended at."""
        self.stop()
        if not self._is_ready:
            raise RuntimeError(f"a worker did not start ({message}): {' '.join(self._command)}")
        number, self.next = self.next, self.next + self._step
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.start()
        return number, outcome, message

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def fuzz(
    folder: Path,
    seed: int,
    count: int | None = None,
    seconds: float | None = None,
    workers: int = 2,
    show: Callable[[Result], None] = lambda result: None,
    readers: str = READERS,
) -> Result:
    """Reads inputs until `count` are read or `seconds` have gone by; keeps those that fail in folder/failures.

    `folder/samples` holds the samples. A worker that ends before its first answer is an error.
    """
    samples, result = read_samples(folder / "samples"), Result()
    started = [Worker(folder / f"worker{i}", folder / "samples", seed, i, workers, readers) for i in range(workers)]
    end = time.monotonic() + (seconds or float("inf"))
    try:
        while (count is None or result.counts.total() < count) and time.monotonic() < end:
            select.select([worker.output for worker in started], [], [], 0.5)
            for worker in started:
                for number, outcome, message in worker.answers():
                    add(result, samples, folder, seed, number, outcome, message)
            show(result)
    finally:
        for worker in started:
            worker.stop()
    return result


def add(
    result: Result, samples: Sequence[Sample], folder: Path, seed: int, number: int, outcome: str, message: str
) -> None:
    """Counts an input, and keeps it where it fails."""
    made = make_input(samples, seed, number)
    kind = f"{made.kind} {made.name}"
    result.counts[kind, outcome] += 1
    if outcome not in GOOD:
        result.failures.append((number, kind, outcome, message))
        kept = folder / "failures" / f"seed{seed}-{number}"
        if not kept.exists():
            made.write(kept)
            (kept / "why.txt").write_bytes(f"{kind}: {outcome}: {message}\n".encode(errors="backslashreplace"))
