"""The convolutions of a model one by one, in both frameworks: what a worker of benchmarks.layers calls.

B batch, T frames, H W pixels, C channels; clips are drawn as B T H W C, kernels as T H W I O. Each framework is
imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.speed import OURS, Device, Precision, Row
from benchmarks.subjects import Preset, random_values, to_torch
from benchmarks.tasks import abstract_task, set_up_jax, set_up_torch

Part = Literal["forward", "by input", "by kernel"]  # a convolution, and its two gradients
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Convolution:
    """A convolution's clip, kernel and outputs, and whether a gradient through the model needs that by its clip."""

    clip: tuple[int, ...]
    kernel: tuple[int, ...]
    outputs: tuple[int, ...]
    stride: tuple[int, int, int]
    padding: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    needs_input_gradient: bool = True

    @classmethod
    def read(cls, described: dict[str, Any]) -> Convolution:
        """Returns the convolution that JSON describes."""
        return cls(**{key: tuples(value) for key, value in described.items()})

    @property
    def name(self) -> str:
        """Its clip, channels, kernel, and stride where there is one."""
        frames, height, width = self.clip[1:4]
        stride = f" / {'x'.join(map(str, self.stride))}" if max(self.stride) > 1 else ""
        kernel = "x".join(map(str, self.kernel[:3]))
        return f"{frames}x{height}x{width}, {self.kernel[3]} to {self.kernel[4]}, {kernel}{stride}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that a gradient through the model computes."""
        return tuple(part for part in PARTS if part != "by input" or self.needs_input_gradient)


def tuples(value: Any) -> Any:
    """Turns nested lists into tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def convolutions_of(preset: Preset, frames: int, size: int) -> list[Convolution]:
    """Lists the convolutions of encoding a clip and of decoding its latents, in their order; nothing is computed."""
    import jax

    from flax_vae.ops.window import lowered

    found = []
    for task in ("encode", "decode"):
        function, state, inputs = abstract_task(Row(preset, "float32", task, frames, size))
        with lowered("plain"):
            traced = jax.make_jaxpr(function)(state, *inputs)
        for equation, _ in equations(traced.jaxpr):
            if equation.primitive.name == "conv_general_dilated":
                clip, kernel, outputs = (each.aval.shape for each in (*equation.invars, *equation.outvars))
                stride, padding = tuples(equation.params["window_strides"]), tuples(equation.params["padding"])
                # The first convolution needs no gradient by its input, which is the clip itself.
                found.append(Convolution(clip, kernel, outputs, stride, padding, needs_input_gradient=bool(found)))
    return found


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields the equations of a traced program and of all within it, and how often each is computed."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    for equation in jaxpr.eqns:
        yield equation, times
        for value in equation.params.values():
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                yield from equations(inner, times * equation.params.get("length", 1))


def ready_part(
    way: str, convolution: Convolution, part: Part, device: Device, precision: Precision
) -> Callable[[], Any]:
    """Prepares a convolution or one of its gradients, in flax_vae or in a layout of torch."""
    rng = np.random.default_rng(0)
    values = [random_values(rng, shape) for shape in (convolution.clip, convolution.kernel, convolution.outputs)]
    if way == OURS:
        return flax_part(convolution, part, values, set_up_jax(device, precision))
    return torch_part(convolution, part, values, set_up_torch(device, precision, way == "channels_last_3d"))


def flax_part(convolution: Convolution, part: Part, values: list[np.ndarray], dtype: Any) -> Callable[[], Any]:
    """Compiles a convolution of flax_vae, or one of its gradients."""
    import jax
    import jax.numpy as jnp

    from flax_vae.ops.lowering import convolve, input_gradient, kernel_gradient
    from flax_vae.ops.window import Window

    window, size = Window(convolution.stride, convolution.padding), convolution.clip[1:4]
    x, kernel, dy = (jnp.asarray(each, dtype) for each in values)
    functions: dict[Part, tuple[Callable[..., Any], tuple[Any, Any]]] = {
        "forward": (lambda x, kernel: convolve(x, kernel, window), (x, kernel)),
        "by input": (lambda dy, kernel: input_gradient(dy, kernel, window, size), (dy, kernel)),
        "by kernel": (lambda x, dy: kernel_gradient(x, dy, window, kernel.shape[:3]), (x, dy)),
    }
    function, inputs = functions[part]
    compiled = jax.jit(function).lower(*inputs).compile()
    return lambda: compiled(*inputs).block_until_ready()


def torch_part(
    convolution: Convolution, part: Part, values: list[np.ndarray], place: dict[str, Any]
) -> Callable[[], Any]:
    """Returns the same for torch, which pads the clip before it convolves, as torch_ref does."""
    import torch
    import torch.nn.functional as F

    x, dy = (to_torch(values[i]).to(**place) for i in (0, 2))
    weight = torch.from_numpy(values[1].transpose(4, 3, 0, 1, 2).copy()).to(**place)
    pads = [size for pair in reversed(convolution.padding) for size in pair]
    padded = F.pad(x, pads)
    nothing = None, convolution.stride, [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1  # bias to groups
    backward = partial(torch.ops.aten.convolution_backward, dy, padded, weight, *nothing)
    calls: dict[Part, Callable[[], torch.Tensor]] = {
        "forward": lambda: F.conv3d(F.pad(x, pads), weight, stride=convolution.stride),
        "by input": lambda: F.pad(backward([True, False, False])[0], [-size for size in pads]),
        "by kernel": lambda: backward([False, True, False])[1],
    }

    @torch.no_grad()
    def call():
        result = calls[part]()
        if place["device"] == "cuda":
            torch.cuda.synchronize()
        return result

    return call
