"""Several processes that share one job: the same command, started once for each of them, on any hosts.

All of them see one folder with its files. Where one of them ends early, the others end too, with an error. jax is
imported late, as the command line answers --help without it.
"""

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as dead and the others end
SHUTDOWN_SECONDS = 30 * 24 * 3600  # that a process waits at its end for the others, which it sees to be alive
GONE_MESSAGE = "another process of the cluster has ended, so this one cannot go on; the same command on every host can"


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
        """Whether any option that joins a cluster is given."""
        return self.cluster or any(value is not None for value in (self.coordinator, self.processes, self.process))


def check(cluster: Cluster) -> None:
    """Raises ValueError where options of a cluster are missing, or contradict each other."""
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
        given = f"--process {cluster.process} of --processes {cluster.processes}"
        raise ValueError(f"{given}: expected a number from 0 to one less")


@contextmanager
def joined(cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Joins a cluster, if one is asked for; yields the index of this process and the number of processes.

    It must come before jax looks for devices. A clean exit waits for the other processes; where one of them ends early,
    this one does too. Raises ValueError for what `check` finds, and where jax finds no cluster.
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
    """Ends this process at once, with a message, where an error shows that another one of the cluster is gone.

    To be entered inside of what cleans up: a collective there would wait for that process until jax gives up.
    """
    try:
        yield
    except Exception as error:
        if not is_joined() or not comes_from_gloo(error):
            raise
        print(f"flax-vae: {GONE_MESSAGE}", file=sys.stderr)
        leave(2)


def comes_from_gloo(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is of gloo, which connects CPUs; jax has no class of errors for it."""
    is_gloo = isinstance(error, (RuntimeError, ValueError)) and "Gloo" in str(error)
    return is_gloo or (error is not None and comes_from_gloo(error.__cause__))


def join(cluster: Cluster) -> None:
    """Waits for the other processes and connects to them."""
    import jax
    from jax.experimental.multihost_utils import sync_global_devices

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    # jax itself would end a process that has waited too long with a dump of its stack
    timer = threading.Timer(cluster.wait, give_up, [cluster])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *(cluster.coordinator, cluster.processes, cluster.process),
            cluster_detection_method=None if cluster.cluster else "deactivate",
            initialization_timeout=cluster.wait + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(f"jax finds no cluster ({error}): give --coordinator, --processes and --process") from error
    except RuntimeError as error:
        raise OSError(f"cannot join the cluster at {cluster.coordinator}: {error}") from error
    finally:
        timer.cancel()
    sync_global_devices("joined")  # gloo connects at the first collective: later one process may be far behind another


def give_up(cluster: Cluster) -> NoReturn:
    """Ends a process that has waited too long for the others."""
    where = f" at {cluster.coordinator}" if cluster.coordinator else ""
    message = f"the processes of the cluster{where} did not all start within {cluster.wait} s"
    message += "; start the same command on every host, or give a longer --wait"
    print(f"flax-vae: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def leave(code: int) -> NoReturn:
    """Ends the process: with `os._exit` while it is one of a cluster, as `sys.exit` would wait for the others."""
    if not is_joined():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_joined() -> bool:
    """Whether this process is one of a cluster now; does not import jax."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def process() -> tuple[int, int]:
    """Returns the index of this process and the number of processes."""
    import jax

    return jax.process_index(), jax.process_count()


def allgather(value: Any) -> list[Any]:
    """Returns the values of all processes, by index; all must call it, with anything that pickles."""
    from jax.experimental.multihost_utils import process_allgather

    if process()[1] == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = np.asarray(process_allgather(np.int32(len(data))))
    rows = np.asarray(process_allgather(np.pad(data, (0, lengths.max() - len(data)))))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def anywhere(number: int) -> int:
    """Returns the largest of the numbers that the processes pass; all of them must call it."""
    from jax.experimental.multihost_utils import process_allgather

    return number if process()[1] == 1 else int(np.max(process_allgather(np.int32(number))))


def check_same(value: Any, what: str) -> None:
    """Raises ValueError, in all processes, where they do not all pass the same value."""
    if others := [number for number, other in enumerate(allgather(value)) if other != value]:
        raise ValueError(f"{what} are not the same in process {process()[0]} as in {others[0]}: start all alike")
