"""Spatial tiling, which is LOSSY. Shapes: B batch, C channels, T frames, H W pixels; z channels and t h w of latents.

Zeros stand at the borders of every tile, and its norms and attention see nothing but the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_ref.families.pyramid import CausalVideoVAE
from torch_ref.models.posterior import DiagonalGaussian

Tiles = list[list[Tensor]]  # rows of tiles, from left to right


@dataclass(frozen=True)
class LossyTiling:
    """Squares of `tile` pixels that share `overlap` pixels with their neighbours, blended as the public model does it.

    One thing is done otherwise: where no more than `overlap` pixels are left for a last tile, the tile before has
    computed all of them, and keeps them. Raises ValueError unless the overlap is 1 to half a tile.
    """

    tile: int = 256
    overlap: int = 64

    def __post_init__(self) -> None:
        if not 0 < 2 * self.overlap <= self.tile:
            raise ValueError(f"overlap is {self.overlap}: expected 1 to half of tile, {self.tile}")

    def encode(self, vae: CausalVideoVAE, x: Tensor) -> DiagonalGaussian:
        """The posterior of B C T H W video in [-1, 1]; what is blended is its moments, before logvar is clamped."""
        overlap = self.overlap // spatial_factor(vae, self)
        return DiagonalGaussian(self.join(self.cut(x, 1, lambda tile: vae.quant_conv(vae.encoder(tile))), overlap))

    def decode(self, vae: CausalVideoVAE, z: Tensor) -> Tensor:
        """B C T H W video around [-1, 1], not clamped, of B z t h w latents."""
        return self.join(self.cut(z, spatial_factor(vae, self), vae.decode), self.overlap)

    def cut(self, x: Tensor, factor: int, step: Callable[[Tensor], Tensor]) -> Tiles:
        """What `step` makes of each tile of B C T H W, a pixel of which stands for `factor` pixels of the video."""
        tile, overlap = self.tile // factor, self.overlap // factor
        tops, lefts = (range(0, max(size - overlap, 1), tile - overlap) for size in x.shape[3:])
        return [[step(x[..., top : top + tile, left : left + tile]) for left in lefts] for top in tops]

    def join(self, tiles: Tiles, overlap: int) -> Tensor:
        """B C T H W of tiles with this overlap: each blended with the one above it, then with the one to its left.

        A blended tile takes the place of the tile, so that later ones are blended with it.
        """
        for i, row in enumerate(tiles):
            for j in range(len(row)):
                if i > 0:
                    row[j] = blended(tiles[i - 1][j], row[j], overlap, axis=3)
                if j > 0:
                    row[j] = blended(row[j - 1], row[j], overlap, axis=4)
        return joined([joined(row, overlap, axis=4) for row in tiles], overlap, axis=3)


def blended(before: Tensor, after: Tensor, overlap: int, axis: int) -> Tensor:
    """The tile `after`, whose first pixels along an axis go over from the last of `before` to its own."""
    after = after.clone()
    for k in range(overlap):
        pixels, share = after.select(axis, k), k / overlap
        pixels.copy_(before.select(axis, k - overlap) * (1 - share) + pixels * share)
    return after


def joined(tiles: list[Tensor], overlap: int, axis: int) -> Tensor:
    """The tiles one after another; each leaves its last pixels to the next."""
    return torch.cat([*(tile.narrow(axis, 0, tile.shape[axis] - overlap) for tile in tiles[:-1]), tiles[-1]], axis)


def spatial_factor(vae: CausalVideoVAE, tiling: LossyTiling) -> int:
    """Pixels that a latent spans in height and in width; raises ValueError unless tiles hold whole latents."""
    factor = 2 ** sum(vae.config.encoder_spatial_down_sample)
    if tiling.tile % factor or tiling.overlap % factor:
        raise ValueError(f"tile={tiling.tile}, overlap={tiling.overlap}: expected multiples of {factor}")
    return factor
