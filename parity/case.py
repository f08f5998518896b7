"""What a row of the parity suite is: the same thing built in both frameworks, and how far results may be apart."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import jax
import torch
from flax import nnx

from flax_vae.ops.window import Lowering, lowered

LAYER_TOLERANCE, MODEL_TOLERANCE = 1e-12, 1e-10
FEW_DRAWS = 3  # of inputs and weights
# Of rows whose errors in one precision differ much from draw to draw: each of several norms divides them by the
# deviation of its group; a value near a kink of leaky ReLU falls to either side.
MANY_DRAWS, KINKED_DRAWS = 8, 16
Outputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row: how to build both sides, what to call, and how far float64 results may be apart (relative)."""

    name: str
    shape: tuple[int, int, int, int, int]
    build_flax: Callable[[], Any]
    build_torch: Callable[[], Any]
    call_flax: Callable[[Any, jax.Array], Outputs]
    call_torch: Callable[[Any, torch.Tensor], Outputs]
    tolerance: float = LAYER_TOLERANCE
    slow: bool = False
    slow_rounded: bool = False  # slow in float32 and bfloat16, where other rows stand for it
    large: bool = False  # takes several GiB
    gradients: bool = True
    draws: int = FEW_DRAWS  # in float32 and bfloat16, whose errors are partly luck


# Where both packages keep the classes that rows name.
HOMES = [f"layers.{name}" for name in ("conv", "norm", "attention", "resnet", "resample")] + ["families.pyramid"]


def named(package: str, class_name: str) -> Any:
    """Returns the class of a name in flax_vae or torch_ref."""
    homes = (import_module(f"{package}.{home}") for home in HOMES)
    return next(getattr(home, class_name) for home in homes if hasattr(home, class_name))


def layer(name: str, shape: tuple, class_name: str, *args, **kwargs) -> Case:
    """A row for a layer class that both packages have under one name, with one signature."""
    with_rngs = class_name != "AvgPool3d"  # it has no parameters
    return Case(
        name,
        shape,
        build_flax=lambda: named("flax_vae", class_name)(
            *args, **kwargs, **({"rngs": nnx.Rngs(0)} if with_rngs else {})
        ),
        build_torch=lambda: named("torch_ref", class_name)(*args, **kwargs),
        call_flax=lambda module, x: {"y": only_output(module(x))},
        call_torch=lambda module, x: {"y": module(x)},
    )


def only_output(result):
    """Drops the carry of layers that return one."""
    return result[0] if isinstance(result, tuple) else result


def function(name: str, shape: tuple, call_flax: Callable, call_torch: Callable) -> Case:
    """A row for functions, which have no parameters; `call_*` map an array to an output, or outputs by name."""

    def by_name(call):
        return lambda _, x: result if isinstance(result := call(x), dict) else {"y": result}

    return Case(
        name,
        shape,
        build_flax=lambda: None,
        build_torch=lambda: None,
        call_flax=by_name(call_flax),
        call_torch=by_name(call_torch),
    )


def computed(by: Lowering, row: Case) -> Case:
    """The same row with its convolutions computed in a way that a platform or a size may choose."""

    def call(module, x):
        with lowered(by):
            return row.call_flax(module, x)

    return replace(row, name=f"{row.name}-by-{by}", call_flax=call)
