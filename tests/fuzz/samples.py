"""Whole files to mutate: checkpoints, data sets, latents, carries, and clips of every container.

A sample is a folder KIND/NAME, named after the file in it that is mutated most. The folder, or its only file, is read.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import torch_files

# container and codec of clips, the format of their pixels, and the codec of their sound
CLIPS = {
    "a.mp4": ("mp4", "libx264", "yuv420p", "aac"),
    "fragmented.mp4": ("mp4", "libx264", "yuv420p", None),
    "b.mov": ("mov", "mpeg4", "yuv420p", "pcm_s16le"),
    "c.mkv": ("matroska", "libx264", "yuv420p", "flac"),
    "d.webm": ("webm", "libvpx", "yuv420p", "libopus"),
    "e.avi": ("avi", "mpeg4", "yuv420p", "pcm_s16le"),
    "f.ts": ("mpegts", "mpeg2video", "yuv420p", "mp2"),
    "g.mpg": ("mpeg", "mpeg1video", "yuv420p", "mp2"),
    "h.flv": ("flv", "flv1", "yuv420p", None),
    "i.wmv": ("asf", "wmv2", "yuv420p", "wmav2"),
    "j.ogv": ("ogg", "libvpx", "yuv420p", "libopus"),
    "k.gif": ("gif", "gif", "rgb8", None),
    "l.png": ("apng", "apng", "rgba", None),
    "m.webp": ("webp", "libwebp_anim", "yuva420p", None),
    "n.m4v": ("mp4", "mpeg4", "yuv420p", None),
    "o.avif": ("avif", "libsvtav1", "yuv420p", None),
    "p.mkv": ("matroska", "ffv1", "yuv420p10le", None),
}
IMAGES = {
    "a.png": ("png", "rgb24"),
    "b.jpg": ("mjpeg", "yuvj444p"),
    "c.webp": ("libwebp", "yuv420p"),
    "d.tiff": ("tiff", "rgb24"),
    "e.bmp": ("bmp", "bgr24"),
}
MOVFLAGS = {"fragmented.mp4": "frag_keyframe+empty_moov+default_base_moof"}


@dataclass(frozen=True)
class Sample:
    """A sample: its kind, the name of the file that matters most, and the contents of all its files by name."""

    kind: str
    name: str
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Writes the files to a folder; returns what is read: a file that is alone, or the folder."""
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder / next(iter(self.files)) if len(self.files) == 1 else folder


def read_samples(folder: Path) -> list[Sample]:
    """Reads all samples of a folder, in the order of their names."""
    found = sorted(path for path in folder.glob("*/*") if path.is_dir())
    files = [{file.name: file.read_bytes() for file in sorted(path.iterdir())} for path in found]
    return [Sample(path.parent.name, path.name, held) for path, held in zip(found, files, strict=True)]


def make_samples(folder: Path) -> None:
    """Makes all samples that the libraries here can write."""
    for make in (checkpoints, data_sets, latents, clips, images):
        for sample in make(folder):
            sample.write(folder / sample.kind / sample.name)


def checkpoints(_: Path) -> Iterator[Sample]:
    """Yields small checkpoints as safetensors, whole and in shards, and as each kind of torch file."""
    from flax import nnx
    from safetensors.numpy import save

    from flax_vae import CausalVideoVAE
    from flax_vae.io import port
    from tests.little import ONE_BLOCK

    rng = np.random.default_rng(0)
    shapes = port.parameters(nnx.eval_shape(lambda: CausalVideoVAE(ONE_BLOCK, rngs=nnx.Rngs(0))))
    tensors = {key: rng.normal(size=held.torch_shape).astype(np.float32) for key, held in shapes.items()}
    config = {"config.json": json.dumps({"_class_name": "CausalVideoVAE", **ONE_BLOCK.to_dict()}, indent=2).encode()}
    name = "diffusion_pytorch_model.safetensors"
    yield Sample("checkpoint", "config.json", config | {name: save(tensors)})
    yield Sample("checkpoint", name, {name: save(tensors), **config})
    keys = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": keys[i::2] for i in range(2)}
    index, listed = (
        "model.safetensors.index.json",
        {"metadata": {}, "weight_map": {key: part for part, held in parts.items() for key in held}},
    )
    shards = {part: save({key: tensors[key] for key in held}) for part, held in parts.items()}
    for main in (index, next(iter(parts))):
        yield Sample("checkpoint", main, {index: json.dumps(listed).encode(), **shards, **config})
    few = {key: tensors[key] for key in keys[:4]}
    made = {
        "zip.pt": torch_files.zipped(few),
        "legacy.bin": torch_files.legacy(few),
        "trainer.pth": torch_files.zipped(few, epoch=torch_files.integer(3), args=torch_files.text("words")),
        "hostile.pt": torch_files.zipped(few, args=torch_files.hostile()),
        "pickle.bin": b"\x80\x02" + torch_files.hostile() + b".",
    }
    for main, data in made.items():
        yield Sample("torch", main, {main: data, **config})


def data_sets(_: Path) -> Iterator[Sample]:
    """Yields manifests and statistics of latents."""
    lines = [{"video": "a.mp4", "text": "x"}, {"image": "deep/b.png"}, {"video": "/c.mkv", "frames": [1, 2.5]}]
    yield Sample(
        "manifest", "lines.jsonl", {"lines.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}
    )
    moments = {"count": 6, "mean": [0.5, 1.5], "squares": [3.0, 4.0]}
    logged = [{"size": None}, {"path": "/a.mp4", "latents": "a", "statistics": {"first": moments, "rest": moments}}]
    logs = {"log.jsonl": logged, "metrics.jsonl": [{"step": step, "mse": 0.5, "gan": None} for step in range(4)]}
    texts = {name: "".join(json.dumps(line) + "\n" for line in held).encode() for name, held in logs.items()}
    for name in texts:
        yield Sample("run", name, texts)
    scaling = {
        f"{part}_{what}": [0.5 + i for i in range(4)] for part in ("first", "rest") for what in ("shift", "scale")
    }
    yield Sample(
        "statistics", "statistics.json", {"statistics.json": json.dumps({"scaling": scaling}, indent=2).encode()}
    )


def latents(folder: Path) -> Iterator[Sample]:
    """Yields latents of a clip, and the carry of a stream."""
    from flax_vae.io.latents import About, write_latents
    from flax_vae.io.trees import save_tree

    about = About(16, 24, Fraction(30000, 1001), "config", "weights")
    rng, path = np.random.default_rng(1), folder / "file"
    shards = {}
    for number, (start, count, frames) in enumerate(((0, 3, 17), (3, 2, 16))):
        mean, logvar = rng.normal(size=(2, 1, count, 2, 3, 4)).astype(np.float32)
        write_latents(path, about, mean, logvar, frames, start, last=number == 1)
        shards[f"{number:05d}.safetensors"] = path.read_bytes()
        if number == 0:
            write_latents(path, replace(about, scaling={"first_shift": 0.0}), mean, logvar, frames)
            yield Sample("latents", "alone.safetensors", {"alone.safetensors": path.read_bytes()})
    yield Sample("latents", "00000.safetensors", shards)
    save_tree(path, ((np.ones((1, 2, 3), np.float32), None), (), (np.zeros(4, np.float32),)), {"settings": "{}"})
    yield Sample("carry", "progress.safetensors", {"progress.safetensors": path.read_bytes()})
    path.unlink()


def frames(count: int) -> np.ndarray:
    """Returns (T, H, W, 3) with motion in them."""
    return (
        np.random.default_rng(2)
        .integers(0, 256, (count + 3, 12, 16, 3))
        .cumsum(axis=0)
        .repeat(2, 1)
        .repeat(2, 2)[3:]
        .astype(np.uint8)
    )


def clips(folder: Path) -> Iterator[Sample]:
    """Yields a clip of every container, some with sound."""
    import av
    from av.error import FFmpegError

    for name, (container, codec, pixels, sound) in CLIPS.items():
        path = folder / name
        options = {"fflags": "+bitexact", **({"movflags": MOVFLAGS[name]} if name in MOVFLAGS else {})}
        try:
            with av.open(str(path), "w", format=container, options=options) as target:
                video = target.add_stream(codec, rate=25)
                video.width, video.height, video.pix_fmt = 32, 24, pixels
                track = None if sound is None else target.add_stream(sound, rate=48000)
                packets = []
                for picture in frames(8):
                    packets += video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
                packets += video.encode()
                if track is not None:
                    track.codec_context.layout, track.bit_rate = "stereo", 64_000
                    tone = av.AudioFrame.from_ndarray(np.zeros((2, 15360), np.float32), "fltp", "stereo")
                    tone.sample_rate, tone.pts = 48000, 0
                    packets += [*track.encode(tone), *track.encode()]
                for packet in packets:
                    target.mux(packet)
        except (ValueError, OSError, FFmpegError) as error:
            print(f"no sample {name}: {error}")
            path.unlink(missing_ok=True)
            continue
        yield Sample("clip", name, {name: path.read_bytes()})
        path.unlink()


def images(_: Path) -> Iterator[Sample]:
    """Yields a picture of every format."""
    import av

    for name, (codec, pixels) in IMAGES.items():
        coder: Any = av.CodecContext.create(codec, "w")
        coder.width, coder.height, coder.pix_fmt, coder.time_base = 32, 24, pixels, Fraction(1, 25)
        picture = av.VideoFrame.from_ndarray(frames(1)[0], format="rgb24").reformat(format=pixels)
        data = b"".join(bytes(packet) for packet in [*coder.encode(picture), *coder.encode(None)])
        yield Sample("image", name, {name: data})
