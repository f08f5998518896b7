"""Compiles programs for devices that are not there, each in a process whose environment names them before jax starts.

Importable without jax.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from flax_vae.planning.chips import Topology, parse_topology
from flax_vae.planning.request import Report, Request

TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
WORKER = "flax_vae.planning.worker"
MAX_ERROR_LINES = 20  # of the standard error of a process that died, which its error shows


def compiled_ahead(requests: Sequence[Request], workers: int = 2) -> Iterator[tuple[Request, Report | ValueError]]:
    """Yields reports as they come, of `workers` processes at a time; a ValueError for what cannot be compiled."""
    running: list[subprocess.Popen] = []
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(compile_one, request, running): request for request in requests}
        try:
            for done in as_completed(waiting):
                try:
                    yield waiting[done], done.result()
                except ValueError as error:
                    yield waiting[done], error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                child.kill()


def compile_one(request: Request, running: list[subprocess.Popen] | None = None) -> Report:
    """Compiles a program in a process of its own, which is appended to `running`; returns the report on it.

    Raises ValueError for a program that cannot be compiled, ModuleNotFoundError without libtpu, and ChildProcessError,
    with the end of its standard error, where the process died.
    """
    command, pipe = [sys.executable, "-m", WORKER], subprocess.PIPE
    environment = environment_for(parse_topology(request.topology))
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        if running is not None:
            running.append(child)
        try:
            out, noise = child.communicate(json.dumps(asdict(request)))
        except BaseException:
            child.kill()
            raise
    try:
        answer = json.loads(out)
    except json.JSONDecodeError:
        last = "\n".join(noise.strip().splitlines()[-MAX_ERROR_LINES:])
        killed = ", perhaps because memory ran out" * (child.returncode == -9)
        ended = f"the process that compiles ended with code {child.returncode}{killed}"
        raise ChildProcessError(f"{ended}:\n{last}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return Report(**answer | {"request": request})


def environment_for(topology: Topology) -> dict[str, str]:
    """Returns the environment of a process that compiles for these devices; ModuleNotFoundError without libtpu."""
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
