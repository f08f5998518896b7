"""The port: torch's tensor names and axis orders <-> ours, for any module whose layers own their leaf rules.

The key of a parameter is its attribute path in our module, except for the last name: that name, and the order of the
axes, are what its layer's `torch` says. A model's `layouts` map keys to the names in files: diffusers' or the authors'.
"""

import warnings
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from flax_vae.io.foreign import wrapped
from flax_vae.io.weights import DTYPES, Arrays, Spec, Tensors

Layout = Callable[[str], str]  # our key -> name of the tensor in a file


class Parameter(NamedTuple):
    """A parameter, its attribute path, and our axes in torch's order."""

    path: tuple[Any, ...]
    variable: nnx.Param
    axes: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in torch."""
        return tuple(self.variable.shape[axis] for axis in self.axes)


def same_names(key: str) -> str:
    """The layout of files whose names are our keys."""
    return key


def layouts_of(module: nnx.Module) -> Mapping[str, Layout]:
    """Returns the layouts that a module reads; the first one is written."""
    return getattr(module, "layouts", {"diffusers": same_names})


def parameters(module: nnx.Module) -> dict[str, Parameter]:
    """Returns every parameter by its key; ValueError names those whose layer has no leaf rule."""
    nodes = dict(nnx.iter_graph(module))
    found, unknown = {}, []
    for path, variable in nodes.items():
        if isinstance(variable, nnx.Param):
            layer = nodes[path[:-1]]
            name, axes = getattr(layer, "torch", {}).get(str(path[-1]), (None, ()))
            if name is None or len(axes) != len(variable.shape):
                unknown.append(f"{dotted(path)} {variable.shape} of a {type(layer).__name__}")
            else:
                found[dotted((*path[:-1], name))] = Parameter(path, variable, axes)
    if unknown:
        raise ValueError(f"no rule says what torch calls {', '.join(unknown)}: add it to the layer's `torch`")
    return found


def dotted(path: tuple[Any, ...]) -> str:
    """Returns an attribute path as torch writes it."""
    return ".".join(map(str, path))


def named_tensors(module: nnx.Module, state: nnx.State | None = None) -> Arrays:
    """Returns a module's parameters in its first layout and torch's axis order, each converted when it is read.

    With `state`, such as gradients, its values replace the parameters; ValueError unless its paths are exactly the
    module's.
    """
    layout = next(iter(layouts_of(module).values()))
    ours = {layout(key): parameter for key, parameter in parameters(module).items()}
    values = dict(nnx.to_flat_state(nnx.state(module, nnx.Param) if state is None else state))
    if stray := values.keys() ^ {p.path for p in ours.values()}:
        paths = ", ".join(sorted(map(dotted, stray)))
        raise ValueError(f"the state must hold exactly the parameters of the module; only one of them holds {paths}")
    arrays = {path: x.get_value() if isinstance(x, nnx.Variable) else x for path, x in values.items()}
    return Arrays({key: arrays[p.path] for key, p in ours.items()}, {key: p.axes for key, p in ours.items()})


def torch_layout(module: nnx.Module, state: nnx.State | None = None) -> dict[str, np.ndarray]:
    """Returns what `named_tensors` names, all at once, as copies."""
    tensors = named_tensors(module, state)
    return {key: np.array(tensors.read(key), order="C") for key in tensors.shapes()}


def load(module: nnx.Module, source: Tensors, dtype: DTypeLike = jnp.float32) -> None:
    """Fills every parameter from tensors with torch's names and axis orders, cast to `dtype`, one at a time.

    Args:
      module: may be abstract, from `nnx.eval_shape`; its random state then gets values too.
      source: tensors in one of the module's layouts, under any prefix and in wrappers, as `match` finds them. Shapes
        may differ from ours by trailing ones, as those of 1x1 convolutions from linear layers.
      dtype: a floating-point dtype.

    Raises:
      ValueError: before any tensor is read, listing all that are missing, unexpected, of another shape, or not
        floating point; also for another `dtype`, or float64 where jax has it disabled. While reading, for a damaged
        file, and for values too large for the dtype; what was read before stays.
    """
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype.name}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"jax has {dtype} disabled: call jax.config.update('jax_enable_x64', True), or use float32")
    ours = parameters(module)
    names = match(module, source.shapes(), source.origin)
    fill_random_state(module)
    for key, parameter in ours.items():
        tensor = source.read(names[key]).reshape(parameter.torch_shape).transpose(np.argsort(parameter.axes))
        parameter.variable.set_value(jnp.asarray(cast(key, tensor, dtype)))


def match(module: nnx.Module, shapes: Mapping[str, Spec], origin: str = "the tensors given") -> dict[str, str]:
    """Returns the source's name of every key of a module, in the layout and under the prefix that share most with it.

    Names may be wrapped, and stand beside other parts of a training checkpoint, which are left out, as are counters:
    integers that belong to no layer. Where the source holds the module's tensors and their average, the average is
    taken, with a warning.

    Raises ValueError, which names the origin and lists all problems at once, unless that is a bijection between keys
    and tensors.
    """
    ours, refusal = parameters(module), f"{origin}: not the weights of this {type(module).__name__}"
    candidates = []
    for layout in layouts_of(module).values():
        named = {layout(key): key for key in ours}
        if parts := wrapped.find_parts(named, shapes):
            part, choice = wrapped.choose(parts)
            candidates.append((len(part.found), wrapped.outside(part, parts), named, choice))
    if not candidates:
        raise ValueError(f"{refusal}: expected names as {next(iter(ours))}, got {outline(list(shapes))}")
    _, part, named, choice = max(candidates, key=lambda candidate: candidate[0])
    if problems := problems_of(part, named, ours, shapes):
        where = f", which were looked for under {part.prefix!r}" if part.prefix else ""
        raise ValueError(f"{refusal}{where}:\n  " + "\n  ".join(problems))
    if choice:
        warnings.warn(choice, stacklevel=2)
    return {named[name]: held for name, held in part.found.items()}


def problems_of(
    part: wrapped.Part, named: Mapping[str, str], ours: Mapping[str, Parameter], shapes: Mapping[str, Spec]
) -> list[str]:
    """Lists what is missing from a part of a source, unexpected in it, or of another shape or dtype than ours."""
    wanted = {name: ours[key].torch_shape for name, key in named.items()}
    problems = [f"missing: {line}" for names in part.missing for line in listed(names, wanted)]
    extra = [[name for name in names if not is_counter(name, part.prefix, shapes[name])] for names in part.unexpected]
    given = {name: shape for name, (shape, _) in shapes.items()}
    problems += [f"unexpected: {line}" for names in extra for line in listed(names, given)]
    for name, held in part.found.items():
        shape, dtype = shapes[held]
        if any(a != b for a, b in zip_longest(shape, wanted[name], fillvalue=1)) and dtype in DTYPES:  # trailing ones
            problems.append(f"wrong shape: {held} is {shape}, expected {wanted[name]}")
        elif dtype not in DTYPES:
            problems.append(f"wrong dtype: {held} is {dtype}, expected one of {', '.join(DTYPES)}")
    return problems


def outline(names: list[str]) -> str:
    """Returns how many names there are, what they have in common, and the first two."""
    if len(names) < 2:
        return names[0] if names else "no tensors"
    prefix = wrapped.common_prefix(names)
    where = f", all under {prefix!r}," if prefix else ""
    return f"{len(names)} tensors{where} such as {', '.join(names[:2])}"


def listed(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns the names of a branch with their shapes, or, for many, how many there are."""
    if len(names) > wrapped.MAX_LISTED:
        return [f"all {len(names)} tensors under {wrapped.common_prefix(names)}"]
    return [f"{name} {shapes[name]}" for name in names]


def is_counter(name: str, prefix: str, spec: Spec) -> bool:
    """Whether a tensor counts something, such as the steps of an average: an integer that belongs to no layer."""
    shape, dtype = spec
    return not shape and "." not in name.removeprefix(prefix) and dtype.lower().startswith(("int", "uint", "i", "u"))


def cast(key: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a copy in `dtype`; ValueError where a value becomes infinite."""
    with np.errstate(over="ignore"):
        values = np.array(tensor, dtype, order="C")
    if values.dtype != tensor.dtype and (np.isinf(values) & ~np.isinf(tensor)).any():
        raise ValueError(f"{key} holds values too large for {dtype.name}: use bfloat16 or float32")
    return values


def fill_random_state(module: nnx.Module) -> None:
    """Fills abstract random state, such as that of dropout: each key gets its own value, counts get 0.

    Raises ValueError for other variables without a value: no checkpoint holds them.
    """
    for index, (path, variable) in enumerate(nnx.iter_graph(module)):
        if not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.Param):
            continue
        if not isinstance(value := variable.get_value(), jax.ShapeDtypeStruct):
            continue
        if isinstance(variable, nnx.RngKey):
            variable.set_value(jax.random.split(jax.random.fold_in(jax.random.key(0), index), value.shape))
        elif isinstance(variable, nnx.RngCount):
            variable.set_value(jnp.zeros(value.shape, value.dtype))
        else:
            what = f"{dotted(path)}, a {type(variable).__name__},"
            raise ValueError(f"{what} has no value: build the module without nnx.eval_shape")
