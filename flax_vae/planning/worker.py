"""The process behind `flax-vae plan`: reads a request on standard input, compiles it, and answers in JSON.

It runs without the devices that it compiles for; its environment names them before jax is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from flax_vae.planning.chips import Topology, parse_topology
from flax_vae.planning.request import Report, Request
from flax_vae.runtime.compiler_options import order_for_memory

if TYPE_CHECKING:
    import jax

    from flax_vae.models.vae import VideoVAE


def main() -> None:
    """Answers on standard output, to which nothing else may write: libraries that do are sent to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        request = Request(**json.load(sys.stdin))
        if parse_topology(request.topology).platform == "cpu":
            order_for_memory()  # as the commands do that will run the program
        answer: dict[str, Any] = asdict(measure(request))
    except ValueError as error:
        answer = {"error": str(error)}
    with answers:
        json.dump(answer, answers)
    sys.stdout.flush()
    os._exit(0)  # libtpu takes seconds to take leave


def measure(request: Request) -> Report:
    """Compiles what is asked for and measures it; ValueError where it cannot be compiled for these devices."""
    from flax_vae.planning.measure import measured, refused
    from flax_vae.runtime.mesh import make_mesh

    topology = parse_topology(request.topology)
    devices = devices_of(topology)
    try:
        mesh = make_mesh(request.mesh, devices)
    except NotImplementedError as error:  # of a mesh that jax cannot lay out on the links of a slice
        raise ValueError(f"{request.topology}: {error}") from None
    lowered = lower_training(request, mesh) if request.job == "train" else lower_coding(request, mesh)
    limit = limit_of(topology, devices[0])
    report = Report(request, len(devices), devices[0].device_kind, None, limit, None)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except RuntimeError as error:
        needed, available = refused(str(error))
        return replace(
            report, needed=needed, available=available, fits=False, compile_seconds=time.perf_counter() - began
        )
    took = time.perf_counter() - began
    return measured(replace(report, compile_seconds=took), compiled, topology.chip)


def devices_of(topology: Topology) -> list[Any]:
    """Returns the devices to compile for; ValueError where there are none."""
    import jax
    from jax.experimental import topologies

    if topology.platform != "tpu":
        if jax.default_backend() != topology.platform:
            raise ValueError(f"this machine has no {topology.platform} that jax can use, but {jax.default_backend()}")
        return jax.devices()
    try:
        return topologies.get_topology_desc(topology.runtime_name, "tpu", **topology.options).devices
    except RuntimeError as error:
        raise ValueError(f"{topology.name}: {str(error).splitlines()[0]}") from None


def limit_of(topology: Topology, device: Any) -> int | None:
    """Returns the bytes that a program may use on a device, where that is known."""
    if topology.chip:
        return int(topology.chip.memory / topology.chip.devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def lower_training(request: Request, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers a step of training, with the GAN if the preset has one."""
    from flax import nnx

    from flax_vae.metrics.lpips import LPIPS
    from flax_vae.train.config import PRESETS
    from flax_vae.train.discriminator_step import new_discriminator
    from flax_vae.train.step import Trainer

    preset = PRESETS[request.preset]
    clips = replace(preset.clips, batch=request.batch, frames=request.frames, size=request.height, images=0.0)
    names = ("model", "precision", "remat", "frame_by_frame", "chunk")
    config = replace(preset, clips=clips, **{name: getattr(request, name) for name in names})
    with_gan = config.gan.kind != "none"
    lpips = nnx.eval_shape(lambda: LPIPS(rngs=nnx.Rngs(0))) if config.loss.lpips else None
    vae = abstract_vae(request)
    discriminator = nnx.eval_shape(lambda: new_discriminator(config, vae.config.pixel_channels)) if with_gan else None
    trainer = Trainer(config, vae, lpips, discriminator, mesh=mesh, fsdp=request.fsdp)
    return trainer.lower((request.batch, request.frames, request.height, request.width), with_gan=with_gan)


def lower_coding(request: Request, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Lowers the program that encodes, or decodes, with weights in the precision that is computed in."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flax_vae.runtime.sharded import lower_decode, lower_encode

    vae = abstract_vae(request)
    structure, parameters, rest = nnx.split(vae, nnx.Param, ...)
    dtype = jnp.dtype(request.precision)
    vae = nnx.merge(structure, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), parameters), rest)
    vae.eval()
    lower = lower_encode if request.job == "encode" else lower_decode
    return lower(vae, mesh, (request.batch, request.frames, request.height, request.width), request.chunk, dtype)


def abstract_vae(request: Request) -> VideoVAE:
    """Returns the model without weights."""
    from flax_vae.families import registry
    from flax_vae.layers.sequence import Execution

    vae = registry.abstract(registry.preset(request.model))
    vae.execution = Execution(request.remat, request.frame_by_frame)
    return vae


if __name__ == "__main__":
    main()
