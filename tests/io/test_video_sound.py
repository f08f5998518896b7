"""Sound beside the pictures of a joined file, of kinds that the target does not hold as they are."""

from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="video needs PyAV: pip install av")

import av

from flax_vae.io.video_join import join
from flax_vae.io.video_writer import VideoWriter
from tests import clips

TONE = 440  # Hz


def write_sound(path, codec, rate, layout, seconds=1):
    """Writes a tone in every channel beside a second of black frames."""
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=25), container.add_stream(codec, rate=rate, layout=layout)
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        sound.bit_rate = 128_000
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
        for number in range(25 * seconds):
            picture.pts = number
            container.mux(video.encode(picture))
        wave = 0.3 * np.sin(2 * np.pi * TONE * np.arange(rate * seconds) / rate)
        channels = av.AudioLayout(layout).nb_channels
        samples = np.repeat((32767 * wave).astype(np.int16), channels)[None]
        frame = av.AudioFrame.from_ndarray(samples, "s16", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux([*sound.encode(frame), *sound.encode(), *video.encode()])
    return path


def hear(path):
    """Returns the codec, the channels, the seconds and the pitch in Hz of the sound."""
    with av.open(str(path)) as container:
        codec = container.streams.audio[0].codec_context
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]).astype(float)
    channels = codec.layout.nb_channels
    samples = samples if codec.format.is_planar else samples[::channels]
    seconds, spectrum = len(samples) / codec.rate, np.abs(np.fft.rfft(samples - samples.mean()))
    return codec.codec.canonical_name, channels, seconds, spectrum.argmax() / seconds


def joined(folder, source, suffix, seconds=1):
    """Returns the path of a file of black frames with the sound of another."""
    with VideoWriter(folder / "piece.mp4", 25, 32, 48) as writer:
        writer.write(np.zeros((25 * seconds, 32, 48, 3), np.uint8))
    join(folder / f"out{suffix}", [folder / "piece.mp4"], Fraction(25), source)
    return folder / f"out{suffix}"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("channel without a name.avi", "pcm_s16le", 44100, "mono"),
        ("packed channel without a name.avi", "adpcm_ima_wav", 44100, "mono"),
        ("channel without a name.wmv", "wmav2", 44100, "mono"),
        ("two channels without names.mov", "pcm_s24le", 48000, "stereo"),
        ("six channels.avi", "pcm_s16le", 48000, "5.1"),
        ("more channels than AAC has.mov", "pcm_s16le", 48000, "7.1.4"),
        ("faster than AAC.mov", "pcm_s24le", 192000, "stereo"),
        ("a rate that AAC has not.avi", "pcm_u8", 11127, "mono"),
        ("not in Matroska.avi", "pcm_alaw", 8000, "mono"),
        ("too slow for MP4.avi", "libmp3lame", 8000, "mono"),
    ],
)
def test_sound_is_kept_whatever_the_target_holds(tmp_path, suffix, name, codec, rate, layout):
    source = write_sound(tmp_path / name, codec, rate, layout)
    _, channels, seconds, _ = hear(source)
    _, kept, length, pitch = hear(joined(tmp_path, source, suffix))
    assert kept in (channels, 2)
    assert kept == channels or channels > 8
    assert abs(length - seconds) < 0.1 + 1024 / rate
    assert abs(pitch - TONE) < 2


def test_sound_whose_channels_and_rate_change_on_the_way_goes_on(tmp_path):
    parts = [
        write_sound(tmp_path / f"{i}.ts", "mp2", rate, layout)
        for i, (rate, layout) in enumerate([(48000, "stereo"), (44100, "mono"), (48000, "stereo"), (32000, "mono")])
    ]
    source = clips.join(tmp_path / "both.ts", *parts)
    codec, channels, seconds, pitch = hear(joined(tmp_path, source, ".mp4", seconds=4))
    assert (codec, channels) == ("aac", 2)
    assert abs(seconds - 4) < 0.2
    assert abs(pitch - TONE) < 2


def test_channels_without_names_that_are_too_many_say_so(tmp_path):
    source = write_sound(tmp_path / "a.avi", "pcm_s16le", 48000, "9 channels")
    with pytest.raises(ValueError, match=r"a\.avi: does not name the 9 channels of its sound"):
        joined(tmp_path, source, ".mp4")
    assert hear(joined(tmp_path, source, ".mkv"))[:2] == ("pcm_s16le", 9)
