"""Convolutions of three by three pixels with 2.25 times fewer products: B batch, T frames, H W pixels, C channels.

Winograd's F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308): y = A' [(G g G') * (B' d B)] A. Tiles d of 4x4 input
pixels, which overlap by two, and kernels g of 3x3 are each transformed to 4x4 sums; the products of these, over
channels, are transformed back to tiles y of 2x2 output pixels. All coefficients are 0, 1, -1 or 1/2, so float32 rounds
about as much as without it. Frames, or blocks of their rows, go one after the other: the sums of one are still in the
cache when all time taps are multiplied with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flax_vae.ops import schedule
from flax_vae.ops.geometry import Pair, frame_steps
from flax_vae.ops.window import fold_frames

CACHE_TILES = 1000  # of a block of a frame: their sums, and the products with these, stay in the cache
CACHE_CHANNELS = 512  # of sums and products together, at which they do; with more, a block has fewer tiles
MAX_BLOCKS = 8  # of a frame: each is compiled

Terms = Sequence[Sequence[tuple[int, float]]]  # rows of a matrix: for each sum, (index, coefficient) of its terms
Sums = list[list[Array]]
INPUT: Terms = [[(0, 1.0), (2, -1.0)], [(1, 1.0), (2, 1.0)], [(2, 1.0), (1, -1.0)], [(1, 1.0), (3, -1.0)]]
KERNEL: Terms = [[(0, 1.0)], [(0, 0.5), (1, 0.5), (2, 0.5)], [(0, 0.5), (1, -0.5), (2, 0.5)], [(2, 1.0)]]
OUTPUT: Terms = [[(0, 1.0), (1, 1.0), (2, 1.0)], [(1, 1.0), (2, -1.0), (3, -1.0)]]


def convolve(x: Array, kernel: Array, padding: tuple[Pair, Pair], backwards: bool = False) -> Array:
    """Convolves (B, T, H, W, I) with (taps, 3, 3, I, O), each frame zero-padded.

    Time is padded with taps - 1 frames of zeros in front, or, for `backwards`, behind.
    """
    rows, columns = (size + sum(pad) - 2 for size, pad in zip(x.shape[2:4], padding, strict=True))
    spectrum = kernel_sums(jnp.concatenate(list(kernel), axis=-1))
    tiles, done = tiled(x, padding), []
    channels = kernel.shape[3] + len(kernel) * kernel.shape[4]
    for block in blocks_of_rows(len(x), tiles.shape[2] // 2 - 1, tiles.shape[3] // 2 - 1, channels):
        seen = tiles[:, :, 2 * block.start : 2 * block.stop + 2]
        seen = schedule.after(done[-1], seen) if done else seen
        done.append(multiplied(seen, spectrum, len(kernel), backwards))
    return jnp.concatenate(done, axis=2)[:, :, :rows, :columns]


def blocks_of_rows(batch: int, rows: int, columns: int, channels: int) -> list[slice]:
    """Cuts the rows of a frame's tiles into blocks that the cache holds, at most `MAX_BLOCKS`."""
    tiles = CACHE_TILES * min(1, CACHE_CHANNELS / channels)
    size = -(-rows // min(MAX_BLOCKS, max(1, round(batch * rows * columns / tiles))))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def multiplied(x: Array, spectrum: Sums, taps: int, backwards: bool) -> Array:
    """Convolves (B, T, H, W, I), padded by `tiled`, with the sums of a kernel, to (B, T, H - 2, W - 2, O).

    A frame is transformed once and multiplied with all taps: 16 matmuls (tiles, I) by (I, taps * O). `later` holds what
    the frames so far have added to the next taps - 1 outputs, so that an output is whole when its last frame is done.
    """
    b, frames, height, width, _ = x.shape
    out = spectrum[0][0].shape[1] // taps

    def add_frame(index, done):
        later, y = done
        frame = frames - 1 - index if backwards else index
        sums = jax.tree.map(jnp.matmul, input_sums(lax.dynamic_index_in_dim(x, frame, 1, keepdims=False)), spectrum)
        sums = jax.tree.map(lambda each: each.reshape(*each.shape[:3], taps, out), sums)
        parts = [output_pixels(sums, tap) for tap in (range(taps) if backwards else reversed(range(taps)))]
        now, *later = [a + b for a, b in zip([*later, 0], parts, strict=True)]
        return later, lax.dynamic_update_index_in_dim(y, now, frame, 1)

    of_frame = b, height // 2 - 1, 2, width // 2 - 1, 2, out
    zero = schedule.after(x, jnp.zeros((), x.dtype))  # otherwise XLA keeps one clip of zeros, and copies it
    y = jnp.broadcast_to(zero, (b, frames, *of_frame[1:]))
    _, y = lax.fori_loop(0, frames, add_frame, ([jnp.zeros(of_frame, x.dtype)] * (taps - 1), y))
    return y.reshape(b, frames, height - 2, width - 2, out)


def kernel_gradient(x: Array, dy: Array, padding: tuple[Pair, Pair], taps: int) -> Array:
    """Returns the gradient by the kernel of `convolve`, given that by its output, with as many frames as the input.

    The transposed transforms: 16 matmuls (I, tiles) by (tiles, taps * O), summed over steps of frames.
    """
    channels, out = x.shape[4], dy.shape[4]
    x, (rows, columns) = tiled(x, padding), (size % 2 for size in dy.shape[2:4])
    steps, size = frame_steps(x.shape[1], len(x) * dy.shape[2] * dy.shape[3])
    missing = steps * size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, missing + taps - 1), (0, rows), (0, columns), (0, 0)))

    def step(sums, index):
        seen = input_sums(fold_frames(lax.dynamic_slice_in_dim(x, index * size, size, 1)))
        later = [fold_frames(lax.dynamic_slice_in_dim(dy, index * size + tap, size, 1)) for tap in range(taps)]
        products = jax.tree.map(over_pixels, seen, output_sums(jnp.stack(later, axis=1)))
        return jax.tree.map(add, sums, products), None

    nothing = jnp.zeros((channels, taps * out), x.dtype)
    sums, _ = lax.scan(step, [[nothing] * 4] * 4, jnp.arange(steps))
    gradient = combined(lambda i, j: sums[i][j], transposed(KERNEL, 3))
    gradient = jnp.stack([jnp.stack(row) for row in gradient]).reshape(3, 3, channels, taps, out)
    return jnp.moveaxis(gradient, 3, 0)[::-1]


def tiled(x: Array, padding: tuple[Pair, Pair]) -> Array:
    """Pads each frame with zeros, up to an even number of rows and columns, which can be cut into tiles."""
    rows, columns = (
        (low, high + (size + low + high) % 2) for size, (low, high) in zip(x.shape[2:4], padding, strict=True)
    )
    return jnp.pad(x, ((0, 0), (0, 0), rows, columns, (0, 0)))


def combined(entry: Callable[[int, int], Array], terms: Terms) -> Sums:
    """Applies a transform to rows and columns of entries (i, j): terms @ entries @ terms'."""
    return [
        [reduce(add, (scaled(entry(i, j), a * b) for i, a in rows for j, b in columns)) for columns in terms]
        for rows in terms
    ]


def scaled(x: Array, weight: float) -> Array:
    """Multiplies by a weight that mostly is 1."""
    return x if weight == 1 else weight * x


def transposed(terms: Terms, count: int) -> Terms:
    """Returns the terms of the transposed matrix, which has `count` rows."""
    return [[(row, weight) for row, line in enumerate(terms) for i, weight in line if i == of] for of in range(count)]


def kernel_sums(kernel: Array) -> Sums:
    """Transforms a kernel (3, 3, I, O) to 4x4 sums (I, O)."""
    return combined(lambda i, j: kernel[i, j], KERNEL)


def input_sums(frame: Array) -> Sums:
    """Transforms frames (B, H, W, C) to 4x4 sums (B, tiles, tiles, C)."""
    b, height, width, channels = frame.shape
    pairs = frame.reshape(b, height // 2, 2, width // 2, 2, channels)
    rows, columns = height // 2 - 1, width // 2 - 1

    def pixels(i, j):
        return pairs[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]

    return combined(pixels, INPUT)


def output_pixels(sums: Sums, tap: int) -> Array:
    """Transforms 4x4 sums (B, tiles, tiles, taps, O) of one tap back to pixels (B, tiles, 2, tiles, 2, O)."""
    pixels = combined(lambda i, j: sums[i][j][:, :, :, tap], OUTPUT)
    return jnp.stack([jnp.stack(row, axis=3) for row in pixels], axis=2)


def output_sums(frames: Array) -> Sums:
    """Transforms pixels (B, taps, H, W, O) to 4x4 sums (B, tiles, tiles, taps * O): `output_pixels` transposed."""
    b, taps, height, width, out = frames.shape
    pairs = frames.reshape(b, taps, height // 2, 2, width // 2, 2, out)

    def pixels(i, j):
        return jnp.moveaxis(pairs[:, :, :, i, :, j], 1, 3).reshape(b, height // 2, width // 2, taps * out)

    return combined(pixels, transposed(OUTPUT, 4))


def over_pixels(x: Array, dy: Array) -> Array:
    """Multiplies (B, tiles, tiles, I) and (B, tiles, tiles, N) to (I, N)."""
    return lax.dot_general(x.reshape(-1, x.shape[3]), dy.reshape(-1, dy.shape[3]), (((0,), (0,)), ((), ())))
