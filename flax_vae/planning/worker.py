"""The process behind `flax-vae plan`: reads a request from standard input, compiles it, and answers in JSON.

It needs none of the devices that it compiles for: its parent sets the environment that names them.
"""

import json
import os
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from flax_vae.families import registry
from flax_vae.layers.sequence import Execution
from flax_vae.metrics.lpips import LPIPS
from flax_vae.models.vae import VideoVAE
from flax_vae.planning.chips import Topology, parse_topology
from flax_vae.planning.measure import measured, refused
from flax_vae.planning.request import Report, Request
from flax_vae.runtime import sharded
from flax_vae.runtime.compiler_options import order_for_memory
from flax_vae.runtime.mesh import make_mesh
from flax_vae.train.config import PRESETS
from flax_vae.train.discriminator_step import new_discriminator
from flax_vae.train.step import Trainer


def main() -> None:
    """Answers on standard output; whatever else libraries write there is redirected to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        request = Request(**json.load(sys.stdin))
        if parse_topology(request.topology).platform == "cpu":
            order_for_memory()  # as the commands do that will run the program; XLA reads it with its first device
        answer: dict[str, Any] = asdict(measure(request))
    except ValueError as error:
        answer = {"error": str(error)}
    with answers:
        json.dump(answer, answers)
    sys.stdout.flush()
    os._exit(0)  # libtpu takes seconds to shut down


def measure(request: Request) -> Report:
    """Compiles the program of a request; ValueError where it cannot be compiled for these devices."""
    topology = parse_topology(request.topology)
    devices = devices_of(topology)
    try:
        mesh = make_mesh(request.mesh, devices)
    except NotImplementedError as error:  # of a mesh that jax cannot lay out on the links of a slice
        raise ValueError(f"{request.topology}: {error}") from None
    lowered = lower(request, mesh)
    chip = topology.chip
    available = int(chip.memory / chip.devices) if chip else (devices[0].memory_stats() or {}).get("bytes_limit")
    report = Report(request, len(devices), devices[0].device_kind, None, available, None)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except RuntimeError as error:
        needed, available = refused(str(error))
        took = time.perf_counter() - began
        return replace(report, needed=needed, available=available, fits=False, compile_seconds=took)
    return measured(replace(report, compile_seconds=time.perf_counter() - began), compiled, chip)


def devices_of(topology: Topology) -> list[Any]:
    """Returns the devices to compile for; ValueError where there are none."""
    if topology.platform != "tpu":
        if jax.default_backend() != topology.platform:
            raise ValueError(f"this machine has no {topology.platform} that jax can use, but {jax.default_backend()}")
        return jax.devices()
    try:
        return topologies.get_topology_desc(topology.runtime_name, "tpu", **topology.options).devices
    except RuntimeError as error:
        raise ValueError(f"{topology.name}: {str(error).splitlines()[0]}") from None


def lower(request: Request, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers the program of a request, of a model without arrays."""
    vae = registry.abstract(registry.preset(request.model))
    vae.execution = Execution(request.remat, request.frame_by_frame)
    shape = (request.batch, request.frames, request.height, request.width)
    if request.job == "train":
        return lower_training(request, vae, mesh, shape)
    structure, parameters, rest = nnx.split(vae, nnx.Param, ...)
    dtype = jnp.dtype(request.precision)
    vae = nnx.merge(structure, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), parameters), rest)
    vae.eval()
    return sharded.lower(request.job, vae, mesh, shape, request.chunk, dtype)


def lower_training(request: Request, vae: VideoVAE, mesh: jax.sharding.Mesh, shape: Any) -> jax.stages.Lowered:
    """Lowers a step of training on clips of a shape (B, T, H, W), with the GAN if the preset has one."""
    preset = PRESETS[request.preset]
    clips = replace(preset.clips, batch=request.batch, frames=request.frames, size=request.height, images=0.0)
    names = ("model", "precision", "remat", "frame_by_frame", "chunk")
    config = replace(preset, clips=clips, **{name: getattr(request, name) for name in names})
    with_gan = config.gan.kind != "none"
    lpips = nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))) if config.loss.lpips else None
    discriminator = nnx.eval_shape(lambda: new_discriminator(config, vae.config.pixel_channels)) if with_gan else None
    trainer = Trainer(config, vae, lpips, discriminator, mesh=mesh, fsdp=request.fsdp)
    return trainer.lower(shape, with_gan=with_gan)


if __name__ == "__main__":
    main()
