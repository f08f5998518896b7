"""What a command shows: results on standard output; notes and progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


def note(message: str) -> None:
    """Says what the command has decided or noticed."""
    print(message, file=sys.stderr, flush=True)


def table(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str] = ("", "")) -> None:
    """Prints a table; numbers stand to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    grid = Table(show_header=any(columns))
    for i, name in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) or row[i] == "" for row in rows)
        grid.add_column(name, justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(Text(title, style="bold"), grid)
    sys.stdout.flush()  # so that results and notes keep their order in a log


def counted(frames: int) -> str:
    """Gives "1 frame", "2 frames"."""
    return f"{frames} frame" + "s" * (frames != 1)


COMPILED = 3  # chunks of a stream that wait for compilation, one of them because results come one behind


class Meter:
    """Counts frames as they are done, chunk by chunk, and moves a bar where there is one."""

    def __init__(self, bar=None, task=None):
        self._bar, self._task, self.frames, self._chunks = bar, task, 0, 0
        self._start = self._settled = self._last = (time.perf_counter(), 0)

    def done(self, frames: int) -> None:
        """Counts the frames of one more chunk."""
        self.frames, self._chunks = self.frames + frames, self._chunks + 1
        self._last = time.perf_counter(), self.frames
        if self._chunks <= COMPILED:
            self._settled = self._last
        if self._bar is not None:
            self._bar.advance(self._task, frames)

    def already(self, frames: int) -> None:
        """Shows frames that another run has done; they count for nothing else."""
        if self._bar is not None:
            self._bar.tasks[self._task].completed += frames

    def pace(self) -> str:
        """Says how long it took, and for clips of many chunks how fast it went once all was compiled."""
        start, settled, end = self._start, self._settled, self._last
        total = f"{counted(end[1])} in {end[0] - start[0]:.1f} s, compilation included"
        if self._chunks < 3 * COMPILED:
            return total
        return f"{(end[1] - settled[1]) / (end[0] - settled[0]):.2f} frames/s ({total})"


@contextmanager
def progress(task: str, total: int | None, unit: str = "frames") -> Iterator[Meter]:
    """Shows a bar with frames, frames per second and the time left; `total` is the expected number, if known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task):
            speed = task.completed / task.finished_time if task.finished_time else task.speed
            return Text(f"{speed:.2f} {unit}/s" if speed else "compiling")

    words = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), Speed()
    ends = TextColumn("ETA"), TimeRemainingColumn()
    # speed over the last ten minutes: a chunk of frames can take longer than the half minute that is the default
    with Progress(*words, *ends, console=Console(stderr=True), speed_estimate_period=600) as bar:
        shown = bar.add_task(task, total=total)
        yield Meter(bar, shown)
