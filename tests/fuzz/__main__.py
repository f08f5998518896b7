"""Reads mutated files: `python -m tests.fuzz --minutes N [--seed S]`, and one of them again with `--number K`.

Prints a table of kinds and outcomes. Every input that fails is kept in OUT/failures/seedS-K. Exits with 1 where one has
failed.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.fuzz.mutations import make_input
from tests.fuzz.readers import READERS
from tests.fuzz.run import Result, fuzz
from tests.fuzz.samples import make_samples, read_samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long to read inputs")
    parser.add_argument("--count", type=int, help="how many inputs to read")
    parser.add_argument("--seed", type=int, default=0, help="what the inputs are made of; 0 by default")
    parser.add_argument("--number", type=int, help="read this input alone, here, and show its traceback")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read")
    parser.add_argument("--out", type=Path, help="folder to write; a temporary one by default")
    options = parser.parse_args()
    if options.number is None and options.minutes is None and options.count is None:
        parser.error("give --minutes, --count or --number")
    out = options.out or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if not (out / "samples").exists():
        make_samples(out / "samples")
    if options.number is not None:
        again(out, options.seed, options.number)
        return
    seconds = None if options.minutes is None else 60 * options.minutes
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), "{task.completed} inputs", console=console) as progress:
        task = progress.add_task(f"seed {options.seed}", total=options.count)
        show = lambda result: progress.update(task, completed=result.counts.total())  # noqa: E731
        result = fuzz(out, options.seed, options.count, seconds, options.workers, show)
    report(result, out)
    sys.exit(bool(result.failures))


def again(out: Path, seed: int, number: int) -> None:
    """Reads one input in this process; its traceback is what Python shows."""
    made = make_input(read_samples(out / "samples"), seed, number)
    shutil.rmtree(out / "again", ignore_errors=True)
    path = made.write(out / "again")
    print(f"{made.kind} {made.name}: {path}", flush=True)
    READERS[made.kind](path, number)
    print("read")


def report(result: Result, out: Path) -> None:
    """Prints the outcomes of every kind, and one failure of each sort."""
    outcomes = sorted({outcome for _, outcome in result.counts}, key=["read", "refused"].__contains__, reverse=True)
    kinds = sorted({kind for kind, _ in result.counts})
    print(f"{'':28}" + "".join(f"{outcome:>14}" for outcome in outcomes))
    for kind in kinds:
        print(f"{kind:28}" + "".join(f"{result.counts[kind, outcome]:14,}" for outcome in outcomes))
    totals = [sum(result.counts[kind, outcome] for kind in kinds) for outcome in outcomes]
    print(f"{result.counts.total():<28,}" + "".join(f"{total:14,}" for total in totals))
    alike = defaultdict(list)
    for number, kind, outcome, message in result.failures:
        alike[outcome, message.rpartition(", ")[2] or message].append((number, kind, message))
    for (outcome, _), found in alike.items():
        number, kind, message = found[0]
        print(f"\n{outcome}, {len(found)} times, as --number {number}, {kind}: {printable(message)}")
    if result.failures:
        print(f"\nkept in {out / 'failures'}")


def printable(message: str) -> str:
    """Returns a message without what no terminal can show, which files may have put into it."""
    return message.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main()
