"""Patch discriminators of clips and reconstructions: B batch, T frames, H W pixels, C channels.

Both return logits (B, T', H', W', 1), high for what looks like a clip.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from flax_vae.io import port
from flax_vae.io.checkpoint import open_checkpoint
from flax_vae.io.files import PathLike
from flax_vae.io.weights import Arrays, Spec
from flax_vae.layers.conv import CausalConv3d, Clip, FrameConv
from flax_vae.layers.norm import CausalGroupNorm
from flax_vae.layers.sequence import run_layers
from flax_vae.ops.precision import accumulation_dtype

WIDTHS = (64, 128, 256, 512)
SLOPE = 0.2  # of leaky ReLU, below zero
TRAINING_PREFIX = re.compile(r"(?:.+\.)?loss\.discriminator\.")
KERNEL_NAME = re.compile(r"(?:.+\.)?main\.(\d+)\.weight")


class PatchDiscriminator(nnx.Module):
    """PatchGAN discriminator of single frames (Isola et al. 2017), with the keys of the public training's.

    4x4 convolutions, one for each of the `widths`, with stride 2 except for the last, and one to a logit; an instance
    norm after all but the first and last.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, in_channels: int = 3, *, rngs: nnx.Rngs):
        layers: list[nnx.Module] = [FrameConv(in_channels, widths[0], 4, 2, 1, rngs=rngs), LeakyRelu()]
        for i, pair in enumerate(pairwise(widths), 2):
            stride = 1 if i == len(widths) else 2
            layers += [FrameConv(*pair, 4, stride, 1, rngs=rngs), InstanceNorm(), LeakyRelu()]
        self.main = nnx.List([*layers, FrameConv(widths[-1], 1, 4, 1, 1, rngs=rngs)])

    @classmethod
    def from_pretrained(cls, path_or_hub_name: PathLike) -> "PatchDiscriminator":
        """Loads the discriminator of a checkpoint, with the number and widths of convolutions that its tensors show.

        Its keys are main.0.weight and so on; in a training checkpoint, those under loss.discriminator. Raises
        FileNotFoundError where there is no such checkpoint, ValueError for a damaged file, and for tensors that are not
        exactly those of a discriminator, with all of them listed.
        """
        source = open_checkpoint(path_or_hub_name)
        shapes = source.shapes()
        names = [name for name in shapes if TRAINING_PREFIX.match(name)] or list(shapes)
        keys = {TRAINING_PREFIX.sub("", name): name for name in names}
        widths = kernel_widths({key: shapes[name] for key, name in keys.items()})
        module = nnx.eval_shape(lambda: cls(widths, rngs=nnx.Rngs(0)))
        tensors = {key: source.read(name) for key, name in keys.items()}
        port.load(module, Arrays(tensors, origin=source.origin))
        return module

    def __call__(self, x: Clip) -> Clip:
        """Returns the logits of (B, T, H, W, C), pixels in [-1, 1]; ValueError for frames that are too small."""
        for layer in self.main:
            x = layer(x)
        return x

    def chunk(self, x: Clip, carry=None):
        """Returns the logits of the next frames of a stream, and the carry, which is empty."""
        return self(x), ()


class CausalPatchDiscriminator(nnx.Module):
    """Discriminator of patches in space and time, in causal convolutions: no logit sees a later frame.

    3x3x3 convolutions, one for each of the `widths` and one to a logit: all but the last of the widths halve height and
    width, all of those but the first also time. A norm of each frame after all but the first and last.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, num_groups: int = 32, in_channels: int = 3, *, rngs: nnx.Rngs):
        pairs = list(pairwise(widths))
        strides = [2] * (len(pairs) - 1) + [1]
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, (1, 2, 2), rngs=rngs)
        self.convs = nnx.List(
            CausalConv3d(*pair, 3, (stride,) * 3, rngs=rngs) for pair, stride in zip(pairs, strides, strict=True)
        )
        self.norms = nnx.List(CausalGroupNorm(num_groups, width, rngs=rngs) for _, width in pairs)
        self.conv_out = CausalConv3d(widths[-1], 1, 3, rngs=rngs)

    def __call__(self, x: Clip) -> Clip:
        """Returns the logits of (B, T, H, W, C), pixels in [-1, 1]."""
        return self.chunk(x)[0]

    def chunk(self, x: Clip, carry=None):
        """Returns the logits of the next frames of a stream, a multiple of 4 after its first, and the carry."""
        norms = [lambda x: x, *self.norms]
        layers = [partial(conv_norm_relu, *pair) for pair in zip([self.conv_in, *self.convs], norms, strict=True)]
        return run_layers([*layers, self.conv_out], x, carry)


def conv_norm_relu(conv: CausalConv3d, norm: Callable[[Clip], Clip], x: Clip, carry=None):
    """Applies a convolution, a norm and leaky ReLU; returns the result and the carry."""
    y, carry = conv(x, carry)
    return jax.nn.leaky_relu(norm(y), SLOPE), carry


class LeakyRelu(nnx.Module):
    """Leaky ReLU; a module only because the public checkpoints count it among the layers."""

    def __call__(self, x: Clip) -> Array:
        """Keeps the shape of x."""
        return jax.nn.leaky_relu(x, SLOPE)


class InstanceNorm(nnx.Module):
    """Normalises every channel of every frame to mean 0 and variance 1; eps 1e-5, no parameters."""

    def __call__(self, x: Clip) -> Array:
        """Keeps the shape (B, T, H, W, C)."""
        wide = x.astype(accumulation_dtype(x))
        centred = wide - wide.mean(axis=(2, 3), keepdims=True)
        variance = jnp.square(centred).mean(axis=(2, 3), keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


def kernel_widths(shapes: Mapping[str, Spec]) -> list[int]:
    """Returns the output channels of each convolution but the last; ValueError where there are none."""
    kernels = {int(found[1]): shape for key, (shape, _) in shapes.items() if (found := KERNEL_NAME.fullmatch(key))}
    widths = [kernels[index][0] for index in sorted(kernels) if len(kernels[index]) == 4][:-1]
    if min(widths, default=0) < 1:
        raise ValueError(f"no discriminator, whose kernels would be main.0.weight and so on, among {[*shapes][:9]}")
    return widths
