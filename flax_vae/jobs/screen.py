"""What a command shows: results on standard output; notes and progress on standard error."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def note(message: str) -> None:
    """Prints what the command has decided or noticed."""
    print(message, file=sys.stderr, flush=True)


def console(**settings: Any) -> "Console":
    """Returns a console that raises BrokenPipeError, as print does, where rich would exit with 1."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise  # the error that is being handled

    return Pipe(**settings)


def table(title: str, rows: Iterable[Sequence[object]], columns: Sequence[str] = ("", "")) -> None:
    """Prints a table with a title; columns of numbers are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    grid = Table(show_header=any(columns))
    for i, name in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) or row[i] == "" for row in rows)
        grid.add_column(name, justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    settings = {} if sys.stdout.isatty() else {"width": 120}
    console(**settings).print(Text(title, style="bold"), grid)
    sys.stdout.flush()  # so that results and notes keep their order in a log


def counted(number: int, unit: str = "frame") -> str:
    """Returns "1 frame", "2 frames"."""
    return f"{number:,} {unit}" + "s" * (number != 1)


def first_few(lines: Sequence[str], where: str = "") -> list[str]:
    """Returns the first nine lines, and how many there are more."""
    return [*lines[:9], *([f"and {len(lines) - 9} more{where}"] if len(lines) > 9 else [])]


COMPILED_CHUNKS = 3  # of a stream that wait for compilation, one of them because results come one chunk late


class Meter:
    """Counts frames as they are done, chunk by chunk, and advances a progress bar where there is one."""

    def __init__(self, bar=None, task=None):
        self._bar, self._task, self.frames, self._chunks = bar, task, 0, 0
        self._start = self._settled = self._last = (time.perf_counter(), 0)

    def done(self, frames: int) -> None:
        """Counts the frames of one more chunk."""
        self.frames, self._chunks = self.frames + frames, self._chunks + 1
        self._last = time.perf_counter(), self.frames
        if self._chunks <= COMPILED_CHUNKS:
            self._settled = self._last
        if self._bar is not None:
            self._bar.advance(self._task, frames)

    def already(self, frames: int) -> None:
        """Advances the bar by frames that were done before; they do not count for the speed."""
        if self._bar is not None:
            self._bar.tasks[self._task].completed += frames

    def pace(self) -> str:
        """Returns in words how long it took, and for many chunks the frames per second after compilation."""
        start, settled, end = self._start, self._settled, self._last
        total = f"{counted(end[1])} in {end[0] - start[0]:.1f} s, compilation included"
        if self._chunks < 3 * COMPILED_CHUNKS:
            return total
        return f"{(end[1] - settled[1]) / (end[0] - settled[0]):.2f} frames/s ({total})"


@contextmanager
def progress(task: str, total: int | None, unit: str = "frames") -> Iterator[Meter]:
    """Shows a bar with frames, frames per second and the time left; `total` is the number of frames, where known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task):
            speed = task.completed / task.finished_time if task.finished_time else task.speed
            return Text(f"{speed:.2f} {unit}/s" if speed else "compiling")

    words = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), Speed()
    ends = TextColumn("ETA"), TimeRemainingColumn()
    # speed over the last ten minutes: a chunk of frames can take longer than the half minute that is the default
    with Progress(*words, *ends, console=console(stderr=True), speed_estimate_period=600) as bar:
        shown = bar.add_task(task, total=total)
        yield Meter(bar, shown)
