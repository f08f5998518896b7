"""A process of Linux that reads inputs one after the other and prints a line for each; its parent sees how it ends."""

import contextlib
import importlib
import json
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.mutations import make_input
from tests.fuzz.readers import DOCUMENTED, check_names
from tests.fuzz.samples import Sample, read_samples

GROWTH_LIMIT = 2**30  # bytes of memory that one input may take
ROOM = 6 * 2**30  # bytes of address space behind what is taken at the start, to protect the machine
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
Readers = dict[str, Callable[[Path, int], None]]


def main(samples: str, readers: str, seed: str, first: str, step: str, folder: str) -> None:
    """Reads the inputs `first`, `first + step` and so on, until it is stopped."""
    held, table = read_samples(Path(samples)), load(readers)
    os.chdir(folder)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the lines are the only output
    executed = watch()
    warm_up(held, table, Path(folder))
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    print("null", file=answers, flush=True)  # ready: from now on an answer is waited for
    number = int(first)
    while True:
        made = make_input(held, int(seed), number)
        outcome, message = read(made, table, Path(folder), number, executed)
        print(json.dumps([number, outcome, message]), file=answers, flush=True)
        number += int(step)


def load(readers: str) -> Readers:
    """Returns the readers by kind; "module:name" says where they are."""
    module, name = readers.split(":")
    return getattr(importlib.import_module(module), name)


def warm_up(samples: list[Sample], readers: Readers, folder: Path) -> None:
    """Reads every whole sample: what is imported for it runs commands of its own and takes memory."""
    for number, sample in enumerate(samples):
        with contextlib.suppress(Exception):
            readers[sample.kind](sample.write(folder / "input"), 8 * number)
        shutil.rmtree(folder / "input")


def watch() -> list[str]:
    """Returns a list that gets what is executed from now on, while its first entry is set."""
    executed: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if executed and event in FORBIDDEN:
            executed.append(f"{event} {args!r:.99}")

    sys.addaudithook(hook)
    return executed


@contextlib.contextmanager
def watched(executed: list[str]) -> Iterator[None]:
    """Switches the watch on."""
    executed.append("watching")
    yield
    if found := executed[1:]:
        raise AssertionError(f"was executed: {found}")


def read(made: Sample, readers: Readers, folder: Path, number: int, executed: list[str]) -> tuple[str, str]:
    """Reads one input; returns what comes of it in a word, and a message where that is a failure."""
    path = made.write(folder / "input")
    before = held_in(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is what is held now
    memory = peak()
    try:
        outcome, message = attempt(lambda: readers[made.kind](path, number), path, executed)
    finally:
        executed.clear()
    if (grown := peak() - memory) > GROWTH_LIMIT:
        outcome, message = "memory", f"took {grown / 2**20:,.0f} MiB; {message}"
    if changed := before ^ held_in(folder):
        outcome, message = "half-written", f"{sorted(changed)}; {message}"
    shutil.rmtree(folder / "input")
    for name in {name for name, _ in changed} - {"input"}:
        (folder / name).unlink(missing_ok=True)
    return outcome, message


def peak() -> int:
    """Returns the most bytes of memory that this process has held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def attempt(call: Callable[[], None], path: Path, executed: list[str]) -> tuple[str, str]:
    """Calls a reader; returns "read", "refused", or "FAILED" and why."""
    try:
        with watched(executed):
            try:
                call()
                return "read", ""
            except DOCUMENTED as error:
                check_names(error, path)
                return "refused", f"{type(error).__name__}: {error!s:.300}"
    except Exception as error:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-6:]]
        return "FAILED", f"{type(error).__name__}: {error!s:.300} ({', '.join(where)})"


def held_in(folder: Path) -> set[tuple[str, int]]:
    """Returns the names of all files in a folder, with their sizes."""
    return {(str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main(*sys.argv[1:])
