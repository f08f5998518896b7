"""The tasks that the speed benchmark compares, in both frameworks, and how each is made ready to be called.

B batch, T frames, H W pixels, C channels; inputs are drawn as B T H W C. Each framework is imported where it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.speed import Device, Precision, Row, Task
from benchmarks.subjects import chunk_shape, config, flax_model, memory_of, random_values, to_torch, torch_model
from flax_vae.train.config import LossConfig, OptimizerConfig

if TYPE_CHECKING:
    import optax

    import torch_ref
    from flax_vae.models.vae import VideoVAE

JAX_PRECISION = {"float32": "highest", "tf32": "default", "bfloat16": "default"}  # of a gpu


class Ready(NamedTuple):
    """A task that can be called: its results, read as B T H W C in float32, and the seconds of making it ready.

    `above` are the bytes that a call takes above its arguments, where the compiler tells.
    """

    call: Callable[[], Sequence[Any]]
    read: Callable[[Any], np.ndarray]
    seconds: dict[str, float]
    above: int | None


def input_shapes(row: Row) -> list[tuple[int, ...]]:
    """Returns the shapes, B T H W C, of what a task takes: a clip or latents; to train, a clip and noise of latents."""
    clip, latents = (chunk_shape(job, row.frames // 8 + 1, row.size, row.size) for job in ("encode", "decode"))
    return {"decode": [latents], "train": [clip, latents]}.get(row.task, [clip])


def flax_task(task: Task, vae: VideoVAE) -> tuple[Callable[..., tuple], Any]:
    """Returns a task of flax_vae as a function of a state and of inputs, and the weights that the state starts from.

    A gradient is that of the mean squared error of what the posterior's mode decodes to, by every weight; the error
    comes first. A training step lowers L1 and KL by AdamW; it returns the next weights and moments, and its loss.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    structure, weights, rest = nnx.split(vae, nnx.Param, ...)

    def model(weights):
        return nnx.merge(structure, weights, rest)

    def encode(weights, video):
        posterior = model(weights).encode(video)
        return posterior.mean, posterior.logvar

    def decode(weights, latents):
        return (model(weights).decode(latents),)

    def gradient(weights, video):
        def loss(weights):
            vae = model(weights)
            return jnp.square(vae.decode(vae.encode(video).mode()) - video).mean()

        error, gradients = jax.value_and_grad(loss)(weights)
        return error, *jax.tree.leaves(gradients)

    def train(state, video, noise):
        def loss(weights):
            vae = model(weights)
            posterior = vae.encode(video)
            return jnp.abs(vae.decode(posterior.at(noise)) - video).mean() + LossConfig().kl * posterior.kl()

        weights, moments = state
        total, gradients = jax.value_and_grad(loss)(weights)
        changes, moments = adamw().update(gradients, moments, weights)
        return (optax.apply_updates(weights, changes), moments), total

    return {"encode": encode, "decode": decode, "gradient": gradient, "train": train}[task], weights


def started(task: Task, weights: Any) -> Any:
    """Returns the state that a task of flax_vae starts from: the weights, to train with AdamW's moments."""
    return (weights, adamw().init(weights)) if task == "train" else weights


def abstract_task(row: Row) -> tuple[Callable[..., tuple], Any, list[Any]]:
    """Returns a task of flax_vae as a function, and the shapes of its state and of its inputs, in float32."""
    import jax
    import jax.numpy as jnp

    from flax_vae.families import registry

    vae = registry.abstract(config(row.preset))
    vae.eval()
    function, weights = flax_task(row.task, vae)
    state = jax.eval_shape(lambda weights: started(row.task, weights), weights)
    return function, state, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in input_shapes(row)]


def adamw() -> optax.GradientTransformation:
    """Returns the optimizer of the training presets, at one learning rate."""
    import optax

    rates = OptimizerConfig()
    return optax.adamw(rates.learning_rate, rates.beta1, rates.beta2, weight_decay=rates.weight_decay)


def torch_task(task: Task, model: torch_ref.CausalVideoVAE, is_compiled: bool) -> Callable[..., Sequence[Any]]:
    """Returns the same task of torch_ref as a function of inputs; its state is in the model."""
    import torch

    maybe_compiled: Callable = torch.compile if is_compiled else lambda function: function
    rates, parameters = OptimizerConfig(), list(model.parameters())

    @torch.no_grad()
    @maybe_compiled
    def encode(video):
        posterior = model.encode(video)
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    @maybe_compiled
    def decode(latents):
        return (model.decode(latents),)

    @maybe_compiled
    def squared_error(video):
        return (model.decode(model.encode(video).mode()) - video).square().mean()

    @maybe_compiled
    def l1_and_kl(video, noise):
        posterior = model.encode(video)
        return (model.decode(posterior.sample(noise)) - video).abs().mean() + LossConfig().kl * posterior.kl()

    def gradient(video):
        error = squared_error(video)
        return error, *torch.autograd.grad(error, parameters)

    decay, betas = rates.weight_decay, (rates.beta1, rates.beta2)
    optimizer = torch.optim.AdamW(parameters, rates.learning_rate, betas, weight_decay=decay, fused=True)

    def train(video, noise):
        total = l1_and_kl(video, noise)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (total,)

    return {"encode": encode, "decode": decode, "gradient": gradient, "train": train}[task]


def set_up_jax(device: Device, precision: Precision) -> Any:
    """Configures jax for a device and a precision; returns the dtype, RuntimeError without such a device."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != device:
        raise RuntimeError(f"jax finds no {device}, only {jax.default_backend()}")
    if device == "gpu":
        jax.config.update("jax_default_matmul_precision", JAX_PRECISION[precision])
    return jnp.bfloat16 if precision == "bfloat16" else jnp.float32


def set_up_torch(device: Device, precision: Precision, is_channels_last: bool = False) -> dict[str, Any]:
    """Configures torch likewise; returns device, dtype and memory format."""
    import torch

    if device == "gpu":
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no gpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision != "float32"
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    layout = torch.channels_last_3d if is_channels_last else torch.contiguous_format
    return {"device": "cuda" if device == "gpu" else "cpu", "dtype": dtype, "memory_format": layout}


def flax_ready(row: Row, device: Device, is_plain: bool, free: int | None) -> Ready:
    """Compiles a task of flax_vae; MemoryError where running it would take more than is free."""
    import jax
    import jax.numpy as jnp

    from flax_vae.ops.window import lowered
    from flax_vae.runtime.memory import compiled_bytes

    dtype = set_up_jax(device, row.precision)
    function, weights = flax_task(row.task, flax_model(row.preset))
    state = started(row.task, jax.tree.map(lambda leaf: leaf.astype(dtype), weights))
    rng, is_training = np.random.default_rng(0), row.task == "train"
    inputs = [jnp.asarray(random_values(rng, shape), dtype) for shape in input_shapes(row)]

    state, structure = jax.tree.flatten(state)  # jax would do it at each call, in Python

    def of_leaves(state, *inputs):
        results = function(jax.tree.unflatten(structure, state), *inputs)
        return (jax.tree.leaves(results[0]), *results[1:]) if is_training else results

    start = time.perf_counter()
    with lowered("plain" if is_plain else "platform"):
        program = jax.jit(of_leaves, donate_argnums=0 if is_training else ()).lower(state, *inputs)
    traced = time.perf_counter()
    compiled = program.compile()
    took = {"trace": traced - start, "compile": time.perf_counter() - traced}
    if free is not None:
        check_memory(compiled, free)

    def call():
        nonlocal state
        results = jax.block_until_ready(compiled(state, *inputs))
        if is_training:
            state, *results = results
        return results

    above = compiled_bytes(compiled) - memory_of(compiled).argument_size_in_bytes
    return Ready(call, lambda x: np.asarray(x, np.float32), took, above)


def check_memory(compiled: Any, free: int) -> None:
    """Raises MemoryError where a process that runs a program would take more than is free."""
    from flax_vae.runtime.memory import compiled_bytes, format_bytes, process_bytes

    needed = process_bytes(compiled_bytes(compiled))
    if needed > free:
        raise MemoryError(f"not run: it would take about {format_bytes(needed)}, and {format_bytes(free)} are free")


def torch_ready(row: Row, device: Device, is_compiled: bool, is_channels_last: bool) -> Ready:
    """Makes a task of torch_ref, which compiles in its first call where it does at all."""
    import torch

    place = set_up_torch(device, row.precision, is_channels_last)
    run = torch_task(row.task, torch_model(row.preset).to(**place), is_compiled)
    rng = np.random.default_rng(0)
    inputs = [to_torch(random_values(rng, shape)).to(**place) for shape in input_shapes(row)]

    def call():
        results = run(*inputs)
        if device == "gpu":
            torch.cuda.synchronize()
        return results

    def read(x):
        array = x.detach().float().cpu().numpy()
        return np.moveaxis(array, 1, -1) if array.ndim == 5 else array

    return Ready(call, read, {}, None)
