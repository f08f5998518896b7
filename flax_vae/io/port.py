"""The port: torch's tensor names and axis orders <-> ours, for any module made of layers that have a rule.

The torch key of a parameter is its attribute path in our modules, but for the last name; that name and the order of
the axes follow from the type of the layer that holds it.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from flax_vae.io.weights import DTYPES, Arrays, Spec, Tensors
from flax_vae.layers.conv import Conv3d, FrameConv
from flax_vae.layers.norm import CausalGroupNorm


class Rule(NamedTuple):
    """Torch's name of a parameter, and which of our axes are torch's, one after the other."""

    name: str
    axes: tuple[int, ...]


RULES: dict[type, dict[str, Rule]] = {
    Conv3d: {"kernel": Rule("weight", (4, 3, 0, 1, 2)), "bias": Rule("bias", (0,))},
    FrameConv: {"kernel": Rule("weight", (3, 2, 0, 1)), "bias": Rule("bias", (0,))},
    nnx.Linear: {"kernel": Rule("weight", (1, 0)), "bias": Rule("bias", (0,))},
    CausalGroupNorm: {"scale": Rule("weight", (0,)), "bias": Rule("bias", (0,))},
}
WRAPPERS = re.compile(r"^(?:module\.|vae\.)+")
OLD_ATTENTION = re.compile(r"(?<![^.])(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Parameter(NamedTuple):
    """A parameter of ours, where it is, and its axes in torch's order."""

    path: tuple[Any, ...]
    variable: nnx.Param
    axes: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape that torch has."""
        return tuple(self.variable.shape[axis] for axis in self.axes)


def parameters(module: nnx.Module) -> dict[str, Parameter]:
    """Gives every parameter by its torch key; ValueError names those that no rule covers."""
    nodes = dict(nnx.iter_graph(module))
    found, strange = {}, []
    for path, variable in nodes.items():
        if isinstance(variable, nnx.Param):
            layer = type(nodes[path[:-1]])
            rule = RULES.get(layer, {}).get(str(path[-1]))
            if rule is None or len(rule.axes) != len(variable.shape):
                strange.append(f"{'.'.join(map(str, path))} {variable.shape} of a {layer.__name__}")
            else:
                found[".".join(map(str, (*path[:-1], rule.name)))] = Parameter(path, variable, rule.axes)
    if strange:
        raise ValueError(f"no rule says what torch calls {', '.join(strange)}: add one to flax_vae.io.port.RULES")
    return found


def named_tensors(module: nnx.Module, state: nnx.State | None = None) -> Arrays:
    """Gives the parameters of a module by torch key and in torch's axis order, each made when it is read.

    With `state`, such as gradients, its values stand for the parameters of the same paths; ValueError when they are
    not exactly the module's.
    """
    ours = parameters(module)
    values = dict(nnx.to_flat_state(nnx.state(module, nnx.Param) if state is None else state))
    astray = values.keys() ^ {p.path for p in ours.values()}
    if astray:
        paths = ", ".join(sorted(".".join(map(str, path)) for path in astray))
        raise ValueError(f"the state must hold exactly the parameters of the module; only one of them holds {paths}")
    arrays = {path: x.get_value() if isinstance(x, nnx.Variable) else x for path, x in values.items()}
    return Arrays({key: arrays[p.path] for key, p in ours.items()}, {key: p.axes for key, p in ours.items()})


def torch_layout(module: nnx.Module, state: nnx.State | None = None) -> dict[str, np.ndarray]:
    """Gives what `named_tensors` names, all at once, as arrays of their own."""
    tensors = named_tensors(module, state)
    return {key: np.array(tensors.read(key), order="C") for key in tensors.shapes()}


def load(module: nnx.Module, source: Tensors, dtype: DTypeLike = jnp.float32) -> None:
    """Fills every parameter from tensors with torch's names and axis orders, cast to `dtype`, one at a time.

    `module` may be abstract, from `nnx.eval_shape`; its random state then gets values too. Names may carry the
    prefixes `module.` and `vae.`; beside tensors under `vae.`, those under `loss.` are other parts of a training
    checkpoint (discriminator, perceptual loss) and are left out. The attention may have the names query, key, value,
    proj_attn of old exports, and be 1x1 convolutions.

    Raises ValueError, before any tensor is read, listing all that are missing, unexpected, given twice, of another
    shape, or not of floating point; also for a `dtype` that is not of floating point, or float64 where jax has it
    disabled. While reading, for a damaged file, and for values too large for the dtype; what was read before stays.
    """
    dtype = checked_dtype(dtype)
    ours = parameters(module)
    names = match(ours, source.shapes(), type(module).__name__)
    fill_random_state(module)
    for key, (_, variable, axes) in ours.items():
        shape = ours[key].torch_shape
        tensor = source.read(names[key]).reshape(shape).transpose(np.argsort(axes))
        variable.set_value(jnp.asarray(cast(key, tensor, dtype)))


def match(ours: Mapping[str, Parameter], shapes: Mapping[str, Spec], what: str) -> dict[str, str]:
    """Gives the name in the source of every torch key of ours; ValueError unless each has exactly one that fits."""
    sources: dict[str, list[str]] = {}
    is_training = any(re.match(r"(?:module\.)*vae\.", name) for name in shapes)
    for name in shapes:
        if name in ours or not (is_training and re.match(r"(?:module\.)*loss\.", name)):
            sources.setdefault(name if name in ours else torch_key(name), []).append(name)
    problems = [f"missing: {key} {ours[key].torch_shape}" for key in ours if key not in sources]
    for key, names in sources.items():
        shape, dtype = shapes[names[0]]
        if len(names) > 1:
            problems.append(f"given twice: {key}, as {' and '.join(names)}")
        elif key not in ours:
            problems.append(f"unexpected: {names[0]} {shape}")
        elif not fits(shape, ours[key].torch_shape):
            problems.append(f"wrong shape: {names[0]} is {shape}, expected {ours[key].torch_shape}")
        elif dtype not in DTYPES:
            problems.append(f"wrong dtype: {names[0]} is {dtype}, expected one of {', '.join(DTYPES)}")
    if problems:
        raise ValueError(f"these are not the weights of this {what}:\n  " + "\n  ".join(problems))
    return {key: names[0] for key, names in sources.items()}


def torch_key(name: str) -> str:
    """Gives the name that today's exports have: without wrappers, and with the attention's new names."""
    return OLD_ATTENTION.sub(lambda found: NEW_ATTENTION[found[1]], WRAPPERS.sub("", name))


def fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Tells whether a tensor holds the values of a parameter; a matrix may also be the kernel of a 1x1 convolution."""
    return shape == expected or (len(expected) == 2 and shape == (*expected, 1, 1))


def checked_dtype(dtype: DTypeLike) -> np.dtype:
    """Gives the dtype for weights; ValueError for one that weights or this jax cannot have."""
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype.name}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"jax has {dtype} disabled: call jax.config.update('jax_enable_x64', True), or use float32")
    return dtype


def cast(key: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Gives a copy in `dtype`; ValueError where a value becomes infinite."""
    with np.errstate(over="ignore"):
        values = np.array(tensor, dtype, order="C")
    if values.dtype != tensor.dtype and (np.isinf(values) & ~np.isinf(tensor)).any():
        raise ValueError(f"{key} holds values too large for {dtype.name}: use bfloat16 or float32")
    return values


def fill_random_state(module: nnx.Module) -> None:
    """Gives abstract random state, such as dropout's, values: to each key its own, to counts 0.

    Raises ValueError for other variables that have no value, since no checkpoint holds them.
    """
    for index, (path, variable) in enumerate(nnx.iter_graph(module)):
        if not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.Param):
            continue
        if isinstance(value := variable.get_value(), jax.ShapeDtypeStruct):
            if isinstance(variable, nnx.RngKey):
                variable.set_value(jax.random.split(jax.random.fold_in(jax.random.key(0), index), value.shape))
            elif isinstance(variable, nnx.RngCount):
                variable.set_value(jnp.zeros(value.shape, value.dtype))
            else:
                name = f"{'.'.join(map(str, path))}, a {type(variable).__name__},"
                raise ValueError(f"{name} has no value: build the module without nnx.eval_shape")
