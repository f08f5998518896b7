"""How many times as fast flax_vae is as another way: processes that take turns, and ratios within the same round."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from benchmarks.subjects import Preset

Device = Literal["cpu", "gpu"]
Precision = Literal["float32", "tf32", "bfloat16"]
Task = Literal["encode", "decode", "gradient", "train"]
Way = Literal["eager", "channels_last_3d", "compile", "compile+channels_last_3d", "plain"]
OURS, PLAIN = "flax_vae", "plain"
MAX_WAIT_SECONDS = 3600  # for an answer of a process
PAUSE_SECONDS = 0.05  # between turns, as idle threads go on spinning for a while
Measured = dict[str, Any]  # what is known of a way, or of all ways of a row, as the JSON has it


@dataclass(frozen=True)
class Row:
    """What is compared: a task of a model, on one clip of 8k + 1 frames that are as high as wide."""

    preset: Preset
    precision: Precision
    task: Task
    frames: int
    size: int

    @property
    def name(self) -> str:
        """Names the row among those of one model and precision."""
        return f"{self.task}, {self.frames}x{self.size}"


class Failed(Exception):
    """A way cannot be measured; says which, and why."""


class Runner(Protocol):
    """A way that has been started: answers what making it ready took, then with each go the seconds of a call."""

    def answer(self) -> Measured: ...

    def go(self) -> float: ...

    def close(self) -> None: ...


class Worker:
    """A process that answers each line with a line of JSON; what its libraries write goes to a log."""

    def __init__(self, name: str, command: Sequence[str], log: IO[bytes], variables: dict[str, str] | None = None):
        self._name, self._scratch = name, tempfile.TemporaryDirectory()
        fresh = {"TORCHINDUCTOR_CACHE_DIR": self._scratch.name}  # compilation is timed, so none is remembered
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | fresh | (variables or {}),
            cwd=Path(__file__).parent.parent,
        )

    def answer(self) -> Measured:
        """Waits for the next line; raises Failed for an error, for silence, and when the process has ended."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if select.select([self._process.stdout], [], [], 1)[0]:
                break
        else:
            if self._process.poll() is None:
                raise Failed(f"{self._name}: gave no answer within {MAX_WAIT_SECONDS} seconds")
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": ended(self._process.wait())}
        if "error" in answer:
            raise Failed(f"{self._name}: {answer['error']}")
        return answer

    def go(self, asked: Any = None) -> float:
        """Has the process call its task once, or the part that is asked for; returns the seconds."""
        assert self._process.stdin is not None
        time.sleep(PAUSE_SECONDS)
        with contextlib.suppress(BrokenPipeError):  # the process has ended, as `answer` will say
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return self.answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()


def ended(code: int) -> str:
    """Returns in words how a process has ended."""
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    return f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}, see workers.log"


def worker(name: str, request: Measured, device: Device, log: IO[bytes]) -> Worker:
    """Starts a process of benchmarks.worker."""
    variables = {
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[device],
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps({"name": name, "device": device, **request})]
    return Worker(name, command, log, variables)


def asked(name: str, request: Measured, device: Device, log: IO[bytes]) -> Measured:
    """Returns the one answer of a process of benchmarks.worker."""
    with contextlib.closing(worker(name, request, device, log)) as process:
        return process.answer()


def compared(
    ways: Iterable[str],
    rounds: int,
    start: Callable[[str], Runner],
    note: Callable[[str], None],
    free: Callable[[], int] | None = None,
) -> Measured:
    """Measures flax_vae and, one after the other, each other way beside it.

    Args:
      ways: what flax_vae is compared with.
      rounds: how often both are timed.
      start: starts a way.
      note: prints what was found so far.
      free: returns the bytes of memory that are left beside both.

    Returns:
      What was found, by way. A way that fails has an error; where flax_vae fails nothing else is measured.
    """
    results: Measured = {}
    try:
        with contextlib.closing(start(OURS)) as ours:
            results[OURS] = ours.answer()
            for way in ways:
                results[way] = against(ours, results[OURS], start, way, rounds, free)
                times = ratio(results, way)
                note(results[way]["error"] if times is None else f"{times:.2f} times as fast as {way}")
            if all("pairs" not in result for result in results.values()):
                results[OURS]["alone"] = [ours.go() for _ in range(rounds)]
    except Failed as failed:
        results[OURS] = results.get(OURS, {}) | {"error": str(failed)}
        note(str(failed))
    return results


def against(
    ours: Runner, ready: Measured, start: Callable[[str], Runner], way: str, rounds: int, free: Callable[[], int] | None
) -> Measured:
    """Measures a way beside ours, which is ready, in as many rounds; an error stands for what cannot be measured."""
    try:
        with contextlib.closing(start(way)) as theirs:
            found = theirs.answer()
            if found["outcome"] != ready["outcome"]:
                raise Failed(f"{way}: gives {found['outcome']}, and {OURS} {ready['outcome']}: another task")
            if free is not None and ready["memory"]["above"] > free():
                raise Failed(f"{way}: not run, as both together would take more memory than is free")
            return found | {"pairs": in_turns(ours, theirs, rounds)}
    except Failed as failed:
        return {"error": str(failed)}


def in_turns(ours: Runner, theirs: Runner, rounds: int) -> list[tuple[float, float]]:
    """Returns the seconds of both in each round; who comes first changes from round to round."""
    pairs = []
    for i in range(rounds):
        if i % 2:
            last = theirs.go()
            pairs.append((ours.go(), last))
        else:
            pairs.append((ours.go(), theirs.go()))
    return pairs


def ratio(results: Measured, way: str) -> float | None:
    """Returns the median over the rounds of the time of a way to ours; None where it was not measured."""
    times = ratios(results, way)
    return statistics.median(times) if times else None


def ratios(results: Measured, way: str) -> list[float]:
    """Returns the time of a way to ours, in each round."""
    return [theirs / ours for ours, theirs in results.get(way, {}).get("pairs", ())]


def seconds(results: Measured, way: str) -> float | None:
    """Returns the median seconds of a way: of ours, those of all rounds with others."""
    if way == OURS:
        times = [pair[0] for result in results.values() for pair in result.get("pairs", ())]
        times += results.get(OURS, {}).get("alone", [])
    else:
        times = [pair[1] for pair in results.get(way, {}).get("pairs", ())]
    return statistics.median(times) if times else None


def best_torch(results: Measured) -> str | None:
    """Returns the fastest way in torch, by its ratio to flax_vae; None where none was measured."""
    found = {way: ratio(results, way) for way in results if way not in (OURS, PLAIN)}
    measured = {way: times for way, times in found.items() if times is not None}
    return min(measured, key=measured.__getitem__) if measured else None
