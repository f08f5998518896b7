"""Joins the pieces of a video, with the sound of another file beside them, without compressing pictures again."""

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from flax_vae.io.files import PathLike, replacing
from flax_vae.io.video_reader import as_fraction, pictures
from flax_vae.io.video_writer import written_rate

# Codecs of sound that players find in these containers, for which others become AAC; Matroska holds all.
PLAYABLE = {"mov": {"aac", "ac3", "alac", "mp3"}, "mp4": {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}}
Timed = Iterator[tuple[Fraction, Any]]  # packets, with their times in seconds


def join(path: PathLike, pieces: Sequence[Path], fps: Fraction, sound: PathLike | None = None) -> None:
    """Writes pieces of a video as one; the file takes its name when it is complete.

    Args:
      pieces: files of one kind of `VideoWriter`.
      fps: their frames per second.
      sound: a file whose sound tracks go with them, up to the end of the pictures: as they are, or as AAC where players
        would not find them in such a file.

    Raises:
      ValueError: pieces that do not continue each other; sound that cannot be read.
    """
    fps = written_rate(fps)
    with replacing(path) as part, av.open(f"file:{part}", "w") as target:
        packets, frames = _pictures(target, pieces, fps)
        tracks = iter(()) if sound is None else _sound(target, sound, frames / fps)
        # `merge` takes a packet of each before it yields the first, so that all tracks are added before any is written
        for _, packet in heapq.merge(packets, tracks, key=lambda entry: entry[0]):
            target.mux(packet)


def _pictures(target, pieces: Sequence[Path], fps: Fraction) -> tuple[Timed, int]:
    counts, headers = [], []
    for piece in pieces:
        with av.open(f"file:{piece}") as source:
            video = source.streams.video[0]
            counts.append(video.frames)
            headers.append(bytes(video.codec_context.extradata or b""))
            if len(headers) == 1:
                out = target.add_stream_from_template(video)
    if len(set(headers)) != 1 or 0 in counts:
        raise ValueError(f"{', '.join(map(str, pieces))}: these pieces of video do not continue each other")

    def packets() -> Timed:
        before = 0
        lead: Any = None  # of decoding before showing, where frames are reordered
        for piece, count in zip(pieces, counts, strict=True):
            with av.open(f"file:{piece}") as source:
                for i, packet in enumerate(source.demux(source.streams.video[0])):
                    if packet.pts is not None:
                        tick = as_fraction(packet.time_base)
                        lead = packet.dts if lead is None else lead
                        # its own lacks this lead in a piece of one or two frames
                        packet.dts = lead + round(i / fps / tick)
                        yield _moved(packet, out, before / fps)
            before += count

    return packets(), sum(counts)


def _sound(target, sound: PathLike, end: Fraction) -> Timed:
    """Adds the sound tracks to the target and yields their packets up to second `end`; errors name the file."""
    try:
        with av.open(f"file:{sound}") as source:
            if any(track.codec_context is None for track in source.streams.audio):
                raise ValueError(f"{sound}: this FFmpeg has no decoder for its sound")
            outs, encoders = {}, {}
            for track in source.streams.audio:
                codec = track.codec_context
                if codec.codec.canonical_name in PLAYABLE.get(target.format.name, {codec.codec.canonical_name}):
                    outs[track.index] = target.add_stream_from_template(track)
                else:
                    outs[track.index] = encoders[track.index] = target.add_stream("aac", rate=track.rate)
                    # raw sound need not state which channel is which
                    outs[track.index].codec_context.layout = "stereo" if codec.layout.nb_channels == 2 else codec.layout
            start, left = _start(sound), set(outs)  # tracks that have not ended
            for packet in source.demux(*source.streams.audio) if outs else ():
                index = packet.stream.index
                for ready in _encoded(packet, encoders[index]) if index in encoders else [packet]:
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


def _start(path: PathLike) -> Fraction:
    """Returns the second at which the first frame is shown; the header's is that of a packet, which may not decode."""
    with av.open(f"file:{path}") as source:
        for frame in source.decode(*pictures(source)[:1]):
            if frame.pts is not None:
                return frame.pts * as_fraction(frame.time_base)
    return Fraction(0)


def _encoded(packet, encoder) -> Iterator[Any]:
    for frame in packet.decode():
        yield from encoder.encode(frame)
    if packet.pts is None:  # the end of the track
        yield from encoder.encode()


def _moved(packet, out, seconds: Fraction) -> tuple[Fraction, Any]:
    """Moves a packet to a stream of another file, by `seconds`; returns its decoding time there, and it."""
    tick = as_fraction(packet.time_base)
    ticks = round(seconds / tick)
    packet.pts, packet.stream = packet.pts + ticks, out
    packet.dts = packet.pts if packet.dts is None else packet.dts + ticks
    return packet.dts * tick, packet
