"""Spatial tiling, which is LOSSY: B batch, T frames, H W pixels, C channels.

Every tile is padded with zeros at its borders, and its norms and attention see nothing beyond it; blending hides the
seams but mends nothing. With random weights the relative error is 0.36 to 0.50. Prefer what is exact: chunks of frames
(`vae.decode(latents, chunk=n)`, `flax_vae.runtime.stream`) bound the memory of a clip of any length. Tiles are for
frames so large that a chunk of one latent does not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_vae.layers.conv import Clip
from flax_vae.layers.scan import scan_chunks
from flax_vae.models.config import ExtraFrames
from flax_vae.models.vae import VideoVAE
from flax_vae.ops.precision import accumulation_dtype
from flax_vae.runtime.stream import Step, compiled


@dataclass(frozen=True)
class LossyTiling:
    """Squares of `tile` pixels, each sharing `overlap` pixels with the next; the defaults are the public model's.

    Raises ValueError unless the overlap is 1 pixel to half a tile.
    """

    tile: int = 256
    overlap: int = 64

    def __post_init__(self):
        if not (isinstance(self.tile, int) and isinstance(self.overlap, int) and 0 < 2 * self.overlap <= self.tile):
            given = f"tile={self.tile!r}, overlap={self.overlap!r}"
            raise ValueError(f"{given}: expected pixels, and an overlap of 1 to half a tile")

    def scaled(self, ratio: Fraction) -> "LossyTiling":
        """Returns the tiling of frames `ratio` times as large; ValueError where a tile would end within a pixel."""
        tile, overlap = self.tile * ratio, self.overlap * ratio
        if tile.denominator > 1 or overlap.denominator > 1:
            raise ValueError(f"tile={self.tile}, overlap={self.overlap}: expected multiples of {ratio.denominator}")
        return LossyTiling(int(tile), int(overlap))

    def spans(self, size: int) -> list[tuple[int, int]]:
        """Returns (start, stop) of each tile along an axis of `size` pixels.

        The public algorithm adds a last tile of at most `overlap` pixels, which the tile before covers: left out.
        """
        starts = range(0, max(size - self.overlap, 1), self.tile - self.overlap)
        return [(start, min(start + self.tile, size)) for start in starts]


def in_lossy_tiles(step: Step, tiling: LossyTiling, ratio: Fraction) -> Step:
    """Turns a step from (B, T, H, W, C) to (B, t, h, w, c), with its carry, into one that computes a tile at a time.

    Tiles are blended as in the public algorithm: by a linear ramp with the tile above, then with the one to the left,
    in place, so that later blends see blended tiles. Those of one shape are one `lax.scan`, which adds each to the
    result at once. The carry is a tuple of the tiles' carries, stacked by shape.

    Args:
      step: makes h = H * ratio and w = W * ratio, rounded up, for any H and W.
      tiling: of the frames that go in.
      ratio: rows and columns that come out for one that goes in: 8 for decoding, 1/8 for encoding.

    Raises:
      ValueError: tiles would end within a pixel; when called, another ratio, or a carry of frames of another size.
    """
    overlap = tiling.scaled(ratio).overlap

    def tiled_step(x: Clip, carry: Any = None) -> tuple[Array, Any]:
        shapes = tiles_by_shape(tiling, *x.shape[2:4])
        before = (None,) * len(shapes) if carry is None else carry
        if len(before) != len(shapes):
            raise ValueError(f"this carry is not of frames of {x.shape[2]}x{x.shape[3]} in tiles of {tiling.tile}")
        result, after = result_zeros(step, x, next(iter(shapes)), before[0], ratio), []
        for (shape, starts), entry in zip(shapes.items(), before, strict=True):
            add = partial(add_tile, step, x, shape, ratio, overlap)
            result, entry = jax.lax.scan(add, result, (jnp.array(starts), entry))
            after.append(entry)
        return result, tuple(after)

    return tiled_step


def tiles_by_shape(tiling: LossyTiling, height: int, width: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Returns the first row and column of every tile of a frame, by height and width of the tiles: at most 4 shapes."""
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (top, bottom), (left, right) in product(tiling.spans(height), tiling.spans(width)):
        shapes.setdefault((bottom - top, right - left), []).append((top, left))
    return shapes


def result_zeros(step, x, shape, carry, ratio):
    """Returns the zeros (B, t, h, w, c) to which tiles are added; `carry` is that of all tiles of this shape."""
    tile = jax.ShapeDtypeStruct((*x.shape[:2], *shape, x.shape[4]), x.dtype)
    y, _ = jax.eval_shape(step, tile, jax.tree.map(lambda leaf: leaf[0], carry))
    if y.shape[2:4] != resized(shape, ratio):
        raise ValueError(f"the step makes {y.shape[2:4]} of {shape}: expected {ratio} times that, rounded up")
    return jnp.zeros((*y.shape[:2], *resized(x.shape[2:4], ratio), y.shape[4]), y.dtype)


def add_tile(step, x, shape, ratio, overlap, result, tile):
    """Computes one (start, carry) of the tiles of a shape; returns the result with its share, and its carry."""
    start, carry = tile
    y, carry = step(jax.lax.dynamic_slice(x, (0, 0, *start, 0), (*x.shape[:2], *shape, x.shape[4])), carry)
    start, wide = start * ratio.numerator // ratio.denominator, accumulation_dtype(y)
    share = tile_share(start, y.shape[2:4], result.shape[2:4], overlap, wide)
    corner = (0, 0, *start, 0)
    others = jax.lax.dynamic_slice(result, corner, y.shape)
    y = others.astype(wide) + share[None, None, :, :, None] * y.astype(wide)
    return jax.lax.dynamic_update_slice(result, y.astype(result.dtype), corner), carry


def resized(size: Sequence[int], ratio: Fraction) -> tuple[int, ...]:
    """Returns the height and width that come out for those that go in, rounded up."""
    return tuple(-(-pixels * ratio.numerator // ratio.denominator) for pixels in size)


def tile_share(start, shape, size, overlap, dtype):
    """Returns the weight (h, w) of a tile in each of its pixels; those of all tiles in a pixel sum to one."""
    (up, down, below), (left, right, _) = (
        ramps(*axis, overlap, dtype) for axis in zip(start, shape, size, strict=True)
    )
    # Four tiles meet in a corner: T, U above it, L to its left, K above L. With ramps p down and q across, T becomes
    #   (1 - q) * (L p + K (1 - p)) + q * (T p + (1 - p) * (U q + K (1 - q))),
    # as U was blended with K before. So rows that a tile shares with one below it have squared ramps across: U has the
    # weight (1 - p) q^2, K (1 - p) (1 - q^2).
    once, twice = left * right, left**2 * (1 - (1 - right) ** 2)
    return (up * down)[:, None] * jnp.where(below[:, None], twice[None], once[None])


def ramps(start, length, size, overlap, dtype):
    """Returns a tile's ramps up from the tile before and down to the one after, 1 elsewhere, and where it goes down."""
    index = jnp.arange(length)
    before = (start > 0) & (index < overlap)
    after = (start + length < size) & (index >= length - overlap)
    rising, falling = ((n.astype(dtype) / overlap) for n in (index, length - index))
    return jnp.where(before, rising, 1), jnp.where(after, falling, 1), after


class TiledModule(nnx.Module):
    """Runs a module (x, carry) -> (y, carry) in lossy tiles, as one compiled program, with the same signature.

    With `chunk`, x is a whole clip: each tile goes through all of it `chunk` frames at a time, and leaves no carry.
    """

    def __init__(self, untiled: nnx.Module, tiling: LossyTiling, ratio: Fraction, chunk: int | None = None):
        self.untiled, self.tiling, self.ratio, self.chunk = untiled, tiling, ratio, chunk

    def __call__(self, x: Clip, carry: Any = None) -> tuple[Array, Any]:
        """Returns the blended tiles (B, t, h, w, c) and a carry; see `in_lossy_tiles`."""
        return compiled(self._in_tiles)(x, carry)

    def _in_tiles(self, x, carry):
        return in_lossy_tiles(compiled(self._tile), self.tiling, self.ratio)(x, carry)

    def _tile(self, x, carry):
        if self.chunk is None:
            return self.untiled(x, carry)
        return scan_chunks(self.untiled, type(self.untiled).__call__, x, self.chunk)[0], None


class LossyTiles(nnx.Module):
    """A model that encodes and decodes in tiles: in the memory of a tile, and LOSSY.

    It has the model's methods, but the results of the public model's tiling, up to rounding (for the one tile that is
    left out see `LossyTiling.spans`). A whole clip, with `chunk` or without, is computed tile by tile from its first
    frame to its last. A stream keeps the carries of all tiles, which take more memory than the model's own. Meant for
    inference: all tiles have the same dropout.

    Args:
      vae: a model, whose weights are taken as they are.
      tiling: in pixels, multiples of the config's `spatial_factor`.

    Raises:
      ValueError: a tiling of other sizes.
    """

    def __init__(self, vae: VideoVAE, tiling: LossyTiling = LossyTiling()):
        pixels = Fraction(vae.config.spatial_factor)
        self.config, self.tiling = vae.config, tiling
        self.vae: Any = nnx.clone(vae)
        # What lies between these and the latents maps single pixels, so it may come after blending, or before cutting:
        # the weights of tiles in a pixel sum to one.
        self.vae.encoder = TiledModule(self.vae.encoder, tiling, 1 / pixels)
        self.vae.decoder = TiledModule(self.vae.decoder, tiling.scaled(1 / pixels), pixels)

    def encode(self, video: Clip, chunk: int | None = None, extra_frames: ExtraFrames = "error") -> Any:
        """Returns the distribution of latents of (B, T, H, W, C), as the model's `encode` does."""
        vae, every = nnx.clone(self.vae), self.config.temporal_factor * video.shape[1]
        vae.encoder.chunk = every if chunk is None else self.config.checked_chunk(chunk)
        return vae.encode(video, extra_frames=extra_frames)

    def decode(self, latents: Clip, chunk: int | None = None) -> Clip:
        """Returns the video of latents (B, t, h, w, z), as the model's `decode` does."""
        if chunk is not None:
            if chunk < 1:
                raise ValueError(f"chunk={chunk}: expected at least 1 latent")
            self.config.checked_chunk(self.config.chunk_frames(chunk))
        vae = nnx.clone(self.vae)
        vae.decoder.chunk = latents.shape[1] if chunk is None else chunk
        return vae.decode(latents)

    def encode_chunk(self, x: Clip, carry: Any = None) -> tuple[Any, Any]:
        """Encodes the next frames of a stream, as the model's `encode_chunk` does."""
        return self.vae.encode_chunk(x, carry)

    def decode_chunk(self, z: Clip, carry: Any = None) -> tuple[Clip, Any]:
        """Decodes the next latents of a stream, as the model's `decode_chunk` does."""
        return self.vae.decode_chunk(z, carry)
