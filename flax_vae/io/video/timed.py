"""When each frame of a file is shown, and until when."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from flax_vae.io.files import PathLike
from flax_vae.io.video.container import as_fraction, frame_rate, opened, stated_end
from flax_vae.io.video.decode import decode

MAX_STILL = 24 * 60 * 60  # seconds that a frame may stay; what looks longer is a clock that starts anew


def timed(path: PathLike, limit: int | None) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Yields frames of PyAV, at most N, each with the seconds after the first at which it begins and ends.

    A frame ends where the next begins, the last where the file says. Errors are those of `decode`, after the frames.
    """
    with opened(path) as (container, stream):
        frames, zero, end, held = decode(path, container, stream), None, Fraction(0), None
        for number in itertools.count():
            try:
                frame = next(frames, None)
            except ValueError:
                if held:
                    yield held[0], end, held[1]
                if number == limit:
                    return
                raise
            if frame is None:
                stated = stated_end(container, stream)
                if held:
                    yield held[0], end if stated is None or zero is None else max(end, stated - zero), held[1]
                return
            time = None if frame.pts is None else frame.pts * as_fraction(frame.time_base)
            if time is not None and (zero is None or (held and not held[0] < time - zero < end + MAX_STILL)):
                zero = time - end  # the first frame, or a clock that starts anew
            begin = end if time is None else time - zero
            if held:
                yield held[0], begin, held[1]
            if number == limit:
                return
            held = begin, frame
            stays = (frame.duration or 0) * as_fraction(frame.time_base)
            end = begin + (stays if 0 < stays < MAX_STILL else 1 / frame_rate(stream))
