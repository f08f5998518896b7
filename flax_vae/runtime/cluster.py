"""Several processes that do the work of one: the same command, started once for each of them, on any hosts.

Files are on a folder that all of them see. Where one of them ends, the others end too, with an error.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from jax.sharding import Mesh

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the others end
LONGEST = 30 * 24 * 3600  # seconds that a process waits at the end for the others, which it sees to be alive
GONE = "another process of the cluster has ended, so this one cannot go on; the same command on every host can"


@dataclass(frozen=True)
class Cluster:
    """What joins processes to a cluster; without any of it a process is alone."""

    coordinator: str | None = None
    """HOST:PORT of process 0, as the others reach it; the same command on every host, with --processes and --process"""
    processes: int | None = None
    """how many processes share the work"""
    process: int | None = None
    """which of them this is, from 0 on"""
    cluster: bool = False
    """in place of these three, where jax finds them by itself: on TPU pods and in SLURM jobs"""
    wait: int = 300
    """seconds to wait for the other processes to start"""

    @property
    def is_asked_for(self) -> bool:
        """Whether the process is to be one of several, or says so in part."""
        return self.cluster or any(value is not None for value in (self.coordinator, self.processes, self.process))


def check(cluster: Cluster) -> None:
    """Raises ValueError where what joins a cluster is not all there, or does not fit together."""
    given = {"--coordinator": cluster.coordinator, "--processes": cluster.processes, "--process": cluster.process}
    missing = [name for name, value in given.items() if value is None]
    if cluster.cluster and len(missing) < 3:
        raise ValueError("--cluster has jax find the cluster: leave --coordinator, --processes and --process out")
    if cluster.wait < 1:
        raise ValueError(f"--wait {cluster.wait}: expected at least 1 second")
    if cluster.cluster:
        return
    if cluster.coordinator is None or cluster.processes is None or cluster.process is None:
        raise ValueError(f"a cluster needs --coordinator, --processes and --process: add {', '.join(missing)}")
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {cluster.coordinator}: expected HOST:PORT, as 10.0.0.1:8476")
    if not 0 <= cluster.process < cluster.processes:
        raise ValueError(
            f"--process {cluster.process} of --processes {cluster.processes}: expected a number from 0 to one less"
        )


@contextmanager
def joined(cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Joins a cluster, if one is asked for, and gives the number of this process and of all; ends when all have ended.

    It must come before jax has looked for devices. Raises ValueError for what `check` finds, and where there is no
    cluster to be found. Where another process ends, this one does; after an error of its own, by `leave`.
    """
    if not cluster.is_asked_for:
        yield 0, 1
        return
    check(cluster)
    join(cluster)
    with noticing():
        yield process()
    import jax

    jax.distributed.shutdown()


@contextmanager
def noticing() -> Iterator[None]:
    """Ends the process at once, and says why, where another one of the cluster turns out to be gone.

    Outside of it, cleaning up may wait for that one until jax ends the process.
    """
    try:
        yield
    except Exception as error:
        if not is_joined() or not comes_from_gloo(error):
            raise
        print(f"flax-vae: {GONE}", file=sys.stderr)
        leave(2)


def comes_from_gloo(error: BaseException | None) -> bool:
    """Tells an error that began, perhaps several errors before it, where processes exchange data."""
    while error is not None:
        if isinstance(error, (RuntimeError, ValueError)) and "Gloo" in str(error):  # of jax, which has no class for it
            return True
        error = error.__cause__
    return False


def join(cluster: Cluster) -> None:
    """Waits for the other processes and connects to them."""
    import jax
    from jax.experimental.multihost_utils import sync_global_devices

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    # jax itself ends a process that has waited too long with a dump of its stack
    waiting = threading.Timer(cluster.wait, give_up, [cluster])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            *(cluster.coordinator, cluster.processes, cluster.process),
            cluster_detection_method=None if cluster.cluster else "deactivate",
            initialization_timeout=cluster.wait + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LONGEST,
        )
    except ValueError as error:
        raise ValueError(f"jax finds no cluster ({error}): give --coordinator, --processes and --process") from error
    except RuntimeError as error:
        raise OSError(f"cannot join the cluster at {cluster.coordinator}: {error}") from error
    finally:
        waiting.cancel()
    sync_global_devices("joined")  # connected while all are here: later one may be long behind another


def give_up(cluster: Cluster) -> NoReturn:
    """Ends a process that has waited too long for the others."""
    where = f" at {cluster.coordinator}" if cluster.coordinator else ""
    message = f"the processes of the cluster{where} did not all start within {cluster.wait} s"
    print(f"flax-vae: {message}; start the same command on every host, or give a longer --wait", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


def leave(code: int) -> NoReturn:
    """Ends the process, at once where it is still one of a cluster: Python's own way out waits for the others."""
    if is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_joined() -> bool:
    """Tells whether this process is one of a cluster at the moment; loads no jax for it."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def process() -> tuple[int, int]:
    """Gives the number of this process, and of all."""
    import jax

    return jax.process_index(), jax.process_count()


def allgather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; all must call it, with anything that pickles."""
    from jax.experimental.multihost_utils import process_allgather

    if process()[1] == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = np.asarray(process_allgather(np.int32(len(data))))
    rows = np.asarray(process_allgather(np.pad(data, (0, lengths.max() - len(data)))))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def anywhere(number: int) -> int:
    """Gives the largest of the numbers that the processes have; all of them must call it."""
    from jax.experimental.multihost_utils import process_allgather

    return number if process()[1] == 1 else int(np.max(process_allgather(np.int32(number))))


def share_of(mesh: Mesh | None) -> tuple[int, int]:
    """Gives (k, N) where this process has the k-th of N equal parts of the clips of a batch, counted from 0.

    Raises ValueError where processes do not have whole clips to themselves, or are left without a mesh.
    """
    number, processes = process()
    if processes == 1:
        return 0, 1
    if mesh is None:
        raise ValueError(
            f"{processes} processes train one model only on a mesh of all their devices, as data={processes}"
        )
    owners = [{device.process_index for device in devices.flat} for devices in mesh.devices]
    rows = [row for row, owner in enumerate(owners) if number in owner]
    each, rest = divmod(len(owners), processes)
    if rest or any(len(owner) > 1 for owner in owners) or rows != list(range(rows[0], rows[0] + each)):
        raise ValueError(
            f"the mesh {dict(mesh.shape)} has clips cross from one of {processes} processes to another: expected data="
            f"{processes}, or a multiple of it"
        )
    return rows[0] // each, processes


def check_same(value: Any, what: str) -> None:
    """Raises ValueError, in all processes, where they do not all have the same."""
    if others := [number for number, other in enumerate(allgather(value)) if other != value]:
        raise ValueError(f"{what} are not the same in process {process()[0]} as in {others[0]}: start all alike")
