"""Compiles programs for devices that are not there: each in a process that is told of them before jax starts.

T frames, H W pixels of a clip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flax_vae.planning.chips import Topology, parse_topology

TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHILD = "flax_vae.planning.worker"
SHOWN = 20  # lines of what a process that died has said


@dataclass(frozen=True)
class Request:
    """A program that is asked for."""

    topology: str
    job: str  # train, encode or decode
    model: str
    batch: int
    frames: int
    height: int
    width: int
    mesh: dict[str, int]
    precision: str
    preset: str = "stage1"  # of the training run
    chunk: int | None = None
    remat: bool = False
    frame_by_frame: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class Report:
    """What a program takes on each device; None for what is not known of these devices."""

    request: Request
    devices: int
    device_kind: str
    needed: int | None  # bytes of memory
    available: int | None
    fits: bool | None
    memory: dict[str, int] | None = None  # that needed, by what it is for; None where the compiler gave up
    flops: int | None = None
    bytes: int | None = None
    collectives: list[dict[str, Any]] | None = None
    seconds: dict[str, float] | None = None  # at least, by what takes them
    bound: str | None = None  # which of these is the longest
    compile_seconds: float | None = None
    loops_of_unknown_length: int = 0

    @property
    def longest(self) -> float:
        """The seconds that it takes at least."""
        return max(self.seconds.values()) if self.seconds else float("inf")


def compiled_ahead(requests: Sequence[Request], at_once: int = 2) -> Iterator[tuple[Request, Report | ValueError]]:
    """Yields reports as they come, `at_once` being compiled; a ValueError for what cannot be compiled at all."""
    running: list[subprocess.Popen] = []
    with ThreadPoolExecutor(at_once) as pool:
        waiting = {pool.submit(compile_one, request, running): request for request in requests}
        try:
            while waiting:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    request = waiting.pop(done)
                    try:
                        yield request, done.result()
                    except ValueError as error:
                        yield request, error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.kill()


def compile_one(request: Request, running: list[subprocess.Popen] | None = None) -> Report:
    """Compiles a program and measures it.

    Raises ValueError for a program that cannot be, ModuleNotFoundError without libtpu, and ChildProcessError, with the
    last that it said, where the process died. What it needs to be stopped is added to `running`.
    """
    command, pipe = [sys.executable, "-m", CHILD], subprocess.PIPE
    environment = environment_for(parse_topology(request.topology))
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        if running is not None:
            running.append(child)
        try:
            out, noise = child.communicate(json.dumps(asdict(request)))
        except BaseException:
            child.kill()
            raise
    with suppress(json.JSONDecodeError):
        return read_answer(json.loads(out), request)
    last = "\n".join(noise.strip().splitlines()[-SHOWN:])
    killed = ", perhaps because memory ran out" * (child.returncode == -9)
    raise ChildProcessError(f"the process that compiles ended with code {child.returncode}{killed}:\n{last}")


def read_answer(answer: dict[str, Any], request: Request) -> Report:
    """Makes a report of what the process says; raises its ValueError."""
    if "error" in answer:
        raise ValueError(answer["error"])
    return Report(**{**answer, "request": request})


def environment_for(topology: Topology) -> dict[str, str]:
    """Gives the variables of a process that compiles for these devices; ModuleNotFoundError without libtpu."""
    variables = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    root = str(Path(__file__).parents[2])
    variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [variables.get("PYTHONPATH")])])
    if topology.platform == "tpu":
        if find_spec("libtpu") is None:
            raise ModuleNotFoundError("libtpu compiles for TPUs, and is not installed", name="libtpu")
        return variables | TPU
    if topology.platform == "cpu":
        count = f"--xla_force_host_platform_device_count={topology.devices}"
        return variables | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": count}
    return variables
