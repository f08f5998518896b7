"""Joins the pieces of a video, with the sound of another file beside them, without compressing pictures again."""

import heapq
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from flax_vae.io.files import PathLike, replacing
from flax_vae.io.video.container import as_fraction, opened
from flax_vae.io.video.frame_times import clock_of, constant
from flax_vae.io.video.timed import MAX_STILL
from flax_vae.io.video_writer import written_rate

# Codecs of sound that players find in these containers, for which others become AAC.
PLAYABLE = {"mov": {"aac", "ac3", "alac", "mp3"}, "mp4": {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}}
MIN_CLOCK, MAX_CLOCK = 10_000, 1_000_000  # ticks of a second, of MP4; Matroska counts milliseconds
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1", 16: "hexadecagonal"}
Timed = Iterator[tuple[Fraction, Any]]  # packets, with their times in seconds


def join(
    path: PathLike,
    pieces: Sequence[Path],
    fps: Fraction,
    sound: PathLike | None = None,
    times: Sequence[Fraction] | None = None,
) -> None:
    """Writes pieces of a video as one; the file takes its name when it is complete.

    Args:
      pieces: files of one kind of `VideoWriter`.
      fps: their frames per second.
      sound: a file whose sound tracks go with them, up to the end of the pictures: as they are, or as AAC where players
        would not find them in such a file.
      times: the seconds at which the frames begin, and the last one ends, where these are not at a constant rate.

    Raises:
      ValueError: pieces that do not continue each other; another number of times; sound that cannot be read.
    """
    with replacing(path) as part, av.open(f"file:{part}", "w") as target:
        packets, end = _pictures(target, pieces, written_rate(fps), times)
        tracks = iter(()) if sound is None else _sound(target, sound, end)
        # `merge` takes a packet of each before it yields the first, so that all tracks are added before any is written
        for _, packet in heapq.merge(packets, tracks, key=lambda entry: entry[0]):
            target.mux(packet)


def _pictures(
    target, pieces: Sequence[Path], fps: Fraction, times: Sequence[Fraction] | None
) -> tuple[Timed, Fraction]:
    """Adds a track to the target; returns its packets, at the times of their frames, and the second of their end."""
    counts, headers = [], []
    for piece in pieces:
        with av.open(f"file:{piece}") as source:
            video = source.streams.video[0]
            counts.append(video.frames)
            headers.append(bytes(video.codec_context.extradata or b""))
            if len(headers) == 1:
                out, tick = target.add_stream_from_template(video), as_fraction(video.time_base)
    if len(set(headers)) != 1 or 0 in counts:
        raise ValueError(f"{', '.join(map(str, pieces))}: these pieces of video do not continue each other")
    frames = sum(counts)
    if is_variable := times is not None:
        tick = Fraction(1, 1000 if target.format.name == "matroska" else _clock(times))
        out.time_base = tick
    times = times or constant(frames, fps)
    if len(times) != frames + 1:
        raise ValueError(f"{pieces[0]} and what follows: got {len(times)} times for {frames} frames, expected one more")
    shown = _increasing(round(time / tick) for time in times)
    end = Fraction(shown[-1]) * tick
    if is_variable:  # Matroska states the rate in its header
        out.codec_context.framerate = Fraction(frames / end).limit_denominator(MAX_CLOCK)
    return _packets(out, pieces, counts, fps, tick, shown, is_variable), end


def _clock(times: Sequence[Fraction]) -> int:
    """Returns the ticks of a second in which all times are whole, as far as players count so many."""
    clock = clock_of(times)
    return min(clock * math.ceil(MIN_CLOCK / clock), MAX_CLOCK)


def _packets(
    out,
    pieces: Sequence[Path],
    counts: Sequence[int],
    fps: Fraction,
    tick: Fraction,
    shown: Sequence[int],
    is_variable: bool,
) -> Timed:
    """Yields the packets of pieces at `fps`, each moved to the tick at which its frame is shown.

    Where frames are reordered, decoding leads by some frames: the N-th packet is decoded when the frame N - lead is
    shown, which is before all that it may stand for. Before the first frame the steps are those of the rate.
    """
    before, lead = 0, None
    packet: Any
    for piece, count in zip(pieces, counts, strict=True):
        with av.open(f"file:{piece}") as source:
            packets = (packet for packet in source.demux(source.streams.video[0]) if packet.pts is not None)
            for i, packet in enumerate(packets, before):
                pace = as_fraction(packet.time_base) * fps
                lead = round(-packet.dts * pace) if lead is None else lead
                number = before + round(packet.pts * pace)
                packet.time_base, packet.stream, packet.pts = tick, out, shown[number]
                packet.dts = shown[i - lead] if i >= lead else shown[0] + round((i - lead) / fps / tick)
                if is_variable:
                    packet.duration = shown[number + 1] - packet.pts
                if is_variable and i == len(shown) - 2:  # not always that of the last frame, but MP4 ends with it
                    packet.dts, packet.duration = packet.pts, shown[-1] - packet.pts
                yield packet.dts * tick, packet
        before += count


def _increasing(ticks: Iterable[int]) -> list[int]:
    """Moves what is not later than the one before it to the next tick."""
    return list(itertools.accumulate(ticks, lambda before, tick: max(tick, before + 1)))


def _sound(target, sound: PathLike, end: Fraction) -> Timed:
    """Adds the sound tracks to the target and yields their packets up to second `end`; errors name the file."""
    with opened(sound) as (source, _):
        try:
            if any(track.codec_context is None for track in source.streams.audio):
                raise ValueError(f"{sound}: this FFmpeg has no decoder for its sound")
            outs, encoders = {}, {}
            for track in source.streams.audio:
                if _is_kept(target, track):
                    outs[track.index] = target.add_stream_from_template(track)
                else:
                    encoders[track.index] = encoder = _Encoder(target, track, sound)
                    outs[track.index] = encoder.stream
            if not outs:
                return
            start, left = _start(sound), set(outs)  # tracks that have not ended
            for packet in _going_on(source.demux(*source.streams.audio)):
                index = packet.stream.index
                for ready in encoders[index].encoded(packet) if index in encoders else [packet]:
                    if ready.pts is None:
                        continue
                    if ready.pts * as_fraction(ready.time_base) - start < end:
                        yield _moved(ready, outs[index], -start)
                    else:
                        left.discard(index)
                if not left:
                    return
        except FFmpegError as error:
            raise ValueError(f"{sound}: its sound cannot be read ({error.strerror})") from error


def _going_on(packets: Iterable[Any]) -> Iterator[Any]:
    """Yields packets; where the clock of their track starts anew, as in files put end to end, they follow the last."""
    clocks: dict[int, tuple[int, int, int]] = {}  # of each track: by how much it is moved, its last time, its end
    for packet in packets:
        if packet.dts is not None:
            index, longest = packet.stream.index, MAX_STILL / as_fraction(packet.time_base)
            shift, last, end = clocks.get(index, (0, packet.dts, packet.dts))
            if not last <= packet.dts + shift < last + longest:
                shift = end - packet.dts
            packet.pts = (packet.dts if packet.pts is None else packet.pts) + shift
            packet.dts += shift
            clocks[index] = shift, packet.dts, packet.dts + (packet.duration or 1)
        yield packet


def _is_kept(target, track) -> bool:
    """Whether players find such sound in such a file, and FFmpeg writes it, which only a header shows."""
    name, container = track.codec_context.codec.canonical_name, target.format.name
    if name not in PLAYABLE.get(container, {name}):
        return False
    try:
        with av.open(io.BytesIO(), "w", format=container) as trial:
            trial.add_stream_from_template(track)
            trial.start_encoding()
    except (FFmpegError, ValueError):
        return False
    return True


class _Encoder:
    """Encodes a track as AAC, also where its rate or its channels change on the way, as in a broadcast."""

    def __init__(self, target: Any, track: Any, sound: PathLike):
        self.stream = _add_aac(target, track, sound)
        self._kind: tuple[str, str, int] | None = None  # of the frames that come now
        self._resampler: Any = None

    def encoded(self, packet: Any) -> Iterator[Any]:
        """Yields the packets that another completes, at the end of its track all that are left."""
        for frame in packet.decode():
            kind = frame.format.name, frame.layout.name, frame.sample_rate
            if kind != self._kind:
                yield from self._rest()
                codec = self.stream.codec_context
                self._kind, self._resampler = kind, av.AudioResampler("fltp", codec.layout, codec.rate)
            for ready in self._resampler.resample(frame):
                yield from self.stream.encode(ready)
        if packet.pts is None:
            yield from self._rest()
            yield from self.stream.encode()

    def _rest(self) -> Iterator[Any]:
        for ready in self._resampler.resample(None) if self._resampler else ():
            yield from self.stream.encode(ready)


def _add_aac(target: Any, track: Any, sound: PathLike) -> Any:
    """Adds a track of AAC, with the channels and rate of another where AAC has these, otherwise two, the next rate."""
    codec = track.codec_context
    count, layout = codec.layout.nb_channels, codec.layout.name
    if layout == f"{count} channels":  # raw sound need not say which channel is which
        if count not in LAYOUTS:
            raise ValueError(f"{sound}: does not name the {count} channels of its sound")
        codec.layout = layout = LAYOUTS[count]
    rates = sorted(av.Codec("aac", "w").audio_rates or ())
    rate = next((rate for rate in rates if rate >= codec.rate), rates[-1])
    try:
        trial = av.CodecContext.create("aac", "w")
        trial.rate, trial.layout, trial.format = rate, layout, "fltp"
        trial.open()
    except (FFmpegError, ValueError):
        layout = "stereo"
    return target.add_stream("aac", rate=rate, layout=layout)


def _start(path: PathLike) -> Fraction:
    """Returns the second at which the first frame is shown; the header's is that of a packet, which may not decode."""
    with opened(path) as (source, stream):
        for frame in source.decode(stream):
            if frame.pts is not None:
                return frame.pts * as_fraction(frame.time_base)
    return Fraction(0)


def _moved(packet, out, seconds: Fraction) -> tuple[Fraction, Any]:
    """Moves a packet to a stream of another file, by `seconds`; returns its decoding time there, and it."""
    tick = as_fraction(packet.time_base)
    ticks = round(seconds / tick)
    packet.pts, packet.stream = packet.pts + ticks, out
    packet.dts = packet.pts if packet.dts is None else packet.dts + ticks
    return packet.dts * tick, packet
