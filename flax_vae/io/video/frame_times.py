"""When the frames of a clip are shown: the second at which each begins, from the first one on, and the end of the last.

A clip of T frames has T + 1 times, exact fractions; where they fit a constant rate, that rate says as much.
"""

import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction

ROUNDING = Fraction(1, 1000)  # seconds: the clock of Matroska, Flash and Windows Media
MAX_CLOCK, MAX_SECONDS = 10**12, 10**8  # of times in a file, ticks of a second and seconds


def is_constant(times: Sequence[Fraction], fps: Fraction, start: int = 0) -> bool:
    """Whether frames from number `start` on are as regular as a clock of milliseconds can show, the last one too."""
    allowed = min(ROUNDING, 1 / (4 * fps))
    *begins, end = times
    is_regular = all(abs(time - i / fps) <= allowed for i, time in enumerate(begins, start))
    return is_regular and abs(end - (start + len(begins)) / fps) < 1 / fps


def uneven(times: Sequence[Fraction], fps: Fraction, start: int = 0) -> Sequence[Fraction] | None:
    """Returns times, or None where the rate says as much."""
    return None if is_constant(times, fps, start) else times


def constant(frames: int, fps: Fraction, start: int = 0) -> list[Fraction]:
    """Returns the times of frames from number `start` on at a constant rate."""
    return [i / fps for i in range(start, start + frames + 1)]


def join_times(parts: Sequence[Sequence[Fraction]]) -> list[Fraction]:
    """Joins the times of parts that follow each other, each of which ends where the next begins.

    Where a part is known by its rate, and so to a millisecond, the next may begin too early: it is moved behind.
    """
    times = [time for part in parts for time in part[:-1]] + list(parts[-1][-1:])
    return list(itertools.accumulate(times, lambda before, time: time if time > before else before + ROUNDING / 10))


def clock_of(times: Sequence[Fraction]) -> int:
    """Returns the ticks of a second in which all times are whole."""
    return math.lcm(*(time.denominator for time in times))


def to_text(times: Sequence[Fraction]) -> str:
    """Returns times as a list in JSON: the ticks of a second, and each time in these."""
    clock = clock_of(times)
    return json.dumps([clock, *(int(time * clock) for time in times)])


def from_text(text: str) -> list[Fraction]:
    """Reads what `to_text` returned; ValueError for anything else."""
    values = json.loads(text)
    if not isinstance(values, list) or len(values) < 3 or any(type(value) is not int for value in values):
        raise ValueError(f"times {text:.60}: expected a list of whole numbers: ticks of a second, times in ticks")
    clock, *ticks = values
    is_in_range = 0 < clock <= MAX_CLOCK and ticks[0] >= 0 and ticks[-1] <= clock * MAX_SECONDS
    if not is_in_range or any(after <= before for before, after in itertools.pairwise(ticks)):
        raise ValueError(f"times {text:.60}: expected times from 0 on, each later than the one before")
    return [Fraction(tick, clock) for tick in ticks]
