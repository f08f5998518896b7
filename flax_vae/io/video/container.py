"""Opens video files and images with PyAV (FFmpeg), and reads what their headers say.

PyAV is imported inside functions: these modules also load where it is not installed.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from flax_vae.io.files import PathLike
from flax_vae.io.video.webp import Animation, is_animation

PATTERN = re.compile(r"[%*?\[{\\]")  # what image2, FFmpeg's reader of image sequences, may take for a pattern of names


def check_source(path: PathLike) -> None:
    """Raises FileNotFoundError or ValueError unless `path` is a file that holds something."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file; give the path of one video or image")
    if not os.path.getsize(path):
        raise ValueError(f"{path}: the file is empty; fetch or write it again")


@contextlib.contextmanager
def opened(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """Opens a file as (container, stream of pictures) of PyAV; FileNotFoundError or ValueError where it has none."""
    import av
    from av.error import FFmpegError

    check_source(path)
    if is_animation(path):
        animation = Animation(path)
        yield animation, animation
        return
    # a title that is not UTF-8 must not make the pictures unreadable; PyAV 19 replaces its bytes by itself
    choices: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    with contextlib.ExitStack() as stack:
        url = f"file:{os.fspath(path)}"  # so that a name such as a:b.mp4 is not taken for a protocol
        if PATTERN.search(url):
            file = stack.enter_context(open(path, "rb"))
            url, choices["options"] = "fd:", {"fd": str(file.fileno())}
        try:
            container = stack.enter_context(av.open(url, **choices))
        except FFmpegError as error:
            raise ValueError(f"{path}: no video or image FFmpeg can read, or cut short ({error.strerror})") from error
        streams = pictures(container)
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "an empty container"
            raise ValueError(f"{path}: has no video, only {kinds}; give a file with pictures")
        if streams[0].codec_context is None:
            raise ValueError(f"{path}: this FFmpeg has no decoder for its video; convert it to H.264")
        try:
            yield container, streams[0]
        except FFmpegError as error:  # of what seeks or reads packets: `decode` names its own
            raise ValueError(f"{path}: damaged ({error.strerror}); fetch the file again") from error


def pictures(container: Any) -> list[Any]:
    """Lists the video streams of a PyAV container, without pictures that are covers of sound; the first one is read."""
    from av.stream import Disposition

    found = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if "mp4" not in container.format.name:
        return found
    # An animated AVIF holds its first picture as a still too, and a still its thumbnail; only tracks have a duration.
    tracks = [stream for stream in found if stream.duration]
    return tracks or sorted(found, key=lambda stream: not stream.disposition & Disposition.default)


def is_image(container: Any) -> bool:
    """Whether the format holds one picture, and no clip."""
    if "mp4" in container.format.name:  # HEIC and AVIF
        stream = pictures(container)[0]
        return stream.frames == 1 and not stream.duration
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def as_fraction(rational: Any) -> Fraction:
    """Converts a fraction of PyAV."""
    return Fraction(rational.numerator, rational.denominator)  # PyAV 19 has a type of its own


def frame_rate(stream: Any) -> Fraction:
    """Returns frames per second, on average, a nominal 25 for an image; ValueError where the file states none."""
    if is_image(stream.container):
        return Fraction(25)
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError(f"{stream.container.name}: states no frame rate; convert it to .mp4 first")
    return as_fraction(rate)


def stated_end(container: Any, stream: Any) -> Fraction | None:
    """Returns the second at which the stream ends by its header; None where FFmpeg would only estimate it."""
    if "mp4" in container.format.name and stream.duration:
        # in fragments, of which the header lists no frames, the duration counts from the second 0 of a broadcast on
        start = (stream.start_time or 0) if stream.frames else 0
        return (start + stream.duration) * as_fraction(stream.time_base)
    if "matroska" in container.format.name:
        clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
        return clock and 3600 * int(clock[1]) + 60 * int(clock[2]) + Fraction(clock[3])
    if container.format.name == "avi" and stream.frames:
        return stream.frames / frame_rate(stream)
    return None
