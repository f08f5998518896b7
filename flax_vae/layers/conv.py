"""Convolutions over time, height and width: the only file that pads time and cuts the carry of a convolution.

B batch, T frames, H W pixels, C channels; arrays are B T H W C, kernels are T H W I O.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from flax_vae.layers.strips import strips
from flax_vae.layers.time_halo import TimeHalo, frames_before
from flax_vae.ops import schedule
from flax_vae.ops.geometry import Pair, causal_padding, conv_output_size, conv_outputs, triple
from flax_vae.ops.lowering import convolve
from flax_vae.ops.precision import add_bias
from flax_vae.ops.window import Window

PadMode = Literal["constant", "replicate", "reflect", "circular"]
Padding = tuple[Pair, Pair, Pair]
Clip = Float[Array, "b _ _ _ _"]  # B T H W C; a layer keeps the batch, and may change everything else
Carry = Array | TimeHalo | tuple[()] | None
TorchLeaves = dict[str, tuple[str, tuple[int, ...]]]  # parameter -> torch's name, and our axes in torch's order

INIT_STD = 0.02  # standard deviation of random kernels, as the public training starts from
_NUMPY_PAD_MODE = {"replicate": "edge", "reflect": "reflect", "circular": "wrap"}


class Conv3d(nnx.Module):
    """Convolution of B T H W C with zero padding, as torch's Conv3d on B C T H W.

    Holds `kernel` (time, height, width, in / groups, out) and `bias` (out). An integer kernel, stride, padding or
    dilation is meant for all three axes. Raises ValueError when `groups` does not divide the channels, and for a
    kernel, stride or dilation of less than 1.
    """

    torch: ClassVar[TorchLeaves] = {"kernel": ("weight", (4, 3, 0, 1, 2)), "bias": ("bias", (0,))}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{groups} groups must divide both {in_channels} input and {out_channels} output channels")
        self.in_channels, self.groups = in_channels, groups
        self.kernel_size, self.stride, self.dilation = triple(kernel_size), triple(stride), triple(dilation)
        sizes = (self.kernel_size, self.stride, self.dilation)
        if min(map(min, sizes)) < 1:
            raise ValueError(f"kernel, stride and dilation must be at least 1, got {', '.join(map(str, sizes))}")
        time, height, width = triple(padding)
        self.padding: Padding = ((time, time), (height, height), (width, width))
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(init_weights(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32)) if bias else None

    def __call__(self, x: Clip) -> Clip:
        """Convolves a clip; raises ValueError when it is smaller than the kernel or has other channels."""
        check_clip(x, self.in_channels)
        self.output_size(x.shape[1:4], self.padding)
        return self.convolve(x, self.padding)

    def output_size(self, size: Sequence[int], padding: Padding) -> tuple[int, ...]:
        """Returns the output's time, height and width (or its last axes alone, for a `size` of fewer axes)."""
        axes = zip(self.kernel_size, self.stride, padding, self.dilation, strict=True)
        last = list(axes)[3 - len(size) :]
        return tuple(conv_output_size(n, *axis) for n, axis in zip(size, last, strict=True))

    def convolve(self, x: Clip, padding: Padding, rest: Carry = None) -> Clip:
        """Convolves with the given padding of time, height and width; too few frames give no frame.

        It starts after the `rest` of the clip, which the carry keeps, is computed: XLA would otherwise cut the carry at
        the end of the program and keep the whole clip until then.
        """
        window = Window(self.stride, padding, self.dilation, self.groups)
        if strips().count > 1:
            x, window = self._around_strips(x, window)
        kernel = schedule.after(rest, self.kernel[...])
        kernel = kernel.reshape(*self.kernel_size, *kernel.shape[-2:])
        y: Any = convolve(x, kernel, window)
        return y if self.bias is None else add_bias(y, self.bias[...])

    def _around_strips(self, x: Clip, window: Window) -> tuple[Clip, Window]:
        """Puts around each strip its halo; ValueError where an output of the frame belongs to no strip."""
        cut, index = strips(), strips().axis - 1
        frame = [size * (cut.count if axis == cut.axis else 1) for axis, size in enumerate(x.shape)][1:4]
        x, padding = cut.extended(x, window.padding)
        of_strips = replace(window, padding=padding)
        wanted = window.output_size(frame, self.kernel_size)[index]
        if wanted != cut.count * of_strips.output_size(x.shape[1:4], self.kernel_size)[index]:
            raise ValueError(
                f"a convolution that gives {wanted} {cut.name} of {frame[index]} cannot be computed in {cut.count} "
                "strips: cut none"
            )
        return x, of_strips


class FrameConv(Conv3d):
    """Convolution of every frame by itself with zero padding, as torch's Conv2d on images.

    Holds `kernel` (height, width, in, out) and `bias` (out). Raises ValueError for a kernel or stride of less than 1.
    """

    torch: ClassVar[TorchLeaves] = {"kernel": ("weight", (3, 2, 0, 1)), "bias": ("bias", (0,))}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        sizes = (1, kernel_size, kernel_size), (1, stride, stride), (0, padding, padding)
        super().__init__(in_channels, out_channels, *sizes, rngs=rngs)
        self.kernel = nnx.Param(self.kernel[0])


class CausalConv3d(nnx.Module):
    """Causal convolution of a stream of frames: no output frame sees a later input frame.

    At the start of the stream time gets dilation * (k - 1) frames of padding in front and none behind; later on the
    carry stands there. Height and width get k // 2 on each side, whatever the stride and the dilation. Padding means
    what it means in torch's `F.pad`; all of it falls back to constant when the first chunk has no more frames than
    its time padding, so with another mode a stream must start with a longer chunk to equal the whole clip. With
    "reflect" and "circular" the first outputs do see later frames, as they do in torch.
    An integer stride is a stride in time alone; an integer dilation is meant for all three axes.

    Raises ValueError for an even height or width of the kernel, an unknown `pad_mode`, a mode that needs more pixels
    than there are, and for "circular" with a carry: it would have to know the end of the clip.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        pad_mode: PadMode = "constant",
        *,
        rngs: nnx.Rngs,
    ):
        kernel_size = triple(kernel_size)
        if not (kernel_size[1] % 2 and kernel_size[2] % 2):
            raise ValueError(f"height and width of a causal kernel must be odd, got {kernel_size}")
        if pad_mode not in get_args(PadMode):
            raise ValueError(f"pad_mode must be one of {', '.join(get_args(PadMode))}, got {pad_mode!r}")
        stride = (stride, 1, 1) if isinstance(stride, int) else stride
        self.conv = Conv3d(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, rngs=rngs)
        self.padding = causal_padding(kernel_size, dilation)
        self.pad_mode: PadMode = pad_mode

    @property
    def frames_a_step(self) -> int:
        """Input frames from one output frame to the next: the stride in time."""
        return self.conv.stride[0]

    @property
    def span(self) -> int:
        """Frames from the oldest that an output needs, or that the stride skips before it, to the newest."""
        return max(self.padding[0][0] + 1, self.conv.stride[0])

    def __call__(self, x: Clip, carry: Carry = None) -> tuple[Clip, Carry]:
        """Returns the output frames that `x` completes, and as carry the input frames that later outputs need."""
        check_clip(x, self.conv.in_channels)
        self.conv.output_size(x.shape[2:4], self.padding)
        before = self.padding[0][0]
        if carry is None:
            check_start(x)
            x = schedule.materialize_on_cpu(x)
            padding, seen, skipped = self.padding, x, 1 - self.span
            mode: PadMode = self.pad_mode if x.shape[1] > before else "constant"
        else:
            if self.pad_mode == "circular" and before:
                raise ValueError(
                    "circular padding joins the end of a clip to its start: pass the whole clip, it cannot be streamed"
                )
            x = schedule.materialize_on_cpu(self._extended(carry, x))
            padding, seen, skipped = ((0, 0), *self.padding[1:]), x[:, self.span - 1 - before :], 0
            mode = self.pad_mode
        kernel, stride, dilation = self.conv.kernel_size[0], self.conv.stride[0], self.conv.dilation[0]
        outputs = conv_outputs(seen.shape[1], kernel, stride, padding[0], dilation)
        rest = self._rest(x, outputs * stride + skipped)
        return self._padded(seen, padding, mode, rest), rest

    def _padded(self, x: Clip, padding: Padding, mode: PadMode, rest: Carry) -> Clip:
        if mode == "constant":
            return self.conv.convolve(x, padding, rest)
        if strips().count > 1:
            raise ValueError(f"{mode} padding cannot be computed in strips, which are padded with zeros: use constant")
        for size, pad, axis in zip(x.shape[1:4], padding, ("frames", "rows", "columns"), strict=True):
            if mode != "replicate" and max(pad) and max(pad) >= size + (mode == "circular"):
                raise ValueError(
                    f"{mode} padding of {max(pad)} needs more than {size} {axis}: use a larger clip or another pad_mode"
                )
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), mode=_NUMPY_PAD_MODE[mode])
        return self.conv.convolve(x, ((0, 0), (0, 0), (0, 0)), rest)

    def _extended(self, carry: Carry, x: Clip) -> Clip:
        if self.span == 1:
            return x
        before = frames_before(carry, x)
        if not isinstance(before, jax.Array | np.ndarray) or (before.shape[:1], before.shape[2:]) != (
            x.shape[:1],
            x.shape[2:],
        ):
            raise ValueError(
                f"a carry of shape {getattr(before, 'shape', before)} does not continue into a chunk of shape "
                f"{x.shape}: use the carry that the same stream returned last"
            )
        return jnp.concatenate([before, x], axis=1)

    def _rest(self, x: Clip, start: int) -> Carry:
        """Returns the frames from `start` on, with frames of zeros in front where it is negative."""
        if self.span == 1:
            return ()
        return jnp.pad(x[:, max(start, 0) :], ((0, 0), (max(-start, 0), 0), (0, 0), (0, 0), (0, 0)))


def init_weights(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    """Draws normal weights of standard deviation `INIT_STD`.

    The length drawn is a power of two, so that a model with dozens of shapes compiles a few draws and not dozens.
    """
    size = math.prod(shape)
    drawn = INIT_STD * jax.random.normal(key, (1 << (size - 1).bit_length(),), dtype)
    return drawn[:size].reshape(shape)


def check_clip(x: Array, channels: int) -> None:
    """Raises ValueError unless `x` is B T H W C with this many channels, and pixels in every frame."""
    if x.ndim != 5 or x.shape[4] != channels or 0 in (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"expected (batch, frames, height, width, {channels}) with at least one pixel, got {tuple(x.shape)}"
        )


def check_start(x: Array) -> None:
    """Raises ValueError when a stream is to start with no frame."""
    if x.shape[1] == 0:
        raise ValueError(f"a stream must start with at least one frame, got {tuple(x.shape)}")
