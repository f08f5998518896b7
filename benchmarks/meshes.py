"""Whether a step of training on a mesh of devices is that of one device: python -m benchmarks.meshes

Eight devices of the CPU, float64, the released network in little with LPIPS and a GAN on frames: the largest relative
differences of the latents and the video, of the losses, and of the gradients by every parameter.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from typing import Any

DEVICES = 8
MESHES = [
    "data=2",
    "time=2",
    "time=4",
    "height=2",
    "height=4",
    "width=4",
    "height=2,width=2",
    "time=2,height=2",
    "time=2,width=2",
    "data=2,height=2,width=2",
    "data=2,time=2,height=2",
    "time=2,height=2,width=2",
]
BATCH, FRAMES, SIZE = 2, 33, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=MESHES, help="as data=2,height=2")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", f"--xla_force_host_platform_device_count={DEVICES}"
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    clip = jax.random.uniform(jax.random.key(2), (BATCH, FRAMES, SIZE, SIZE, 3), minval=-1.0)
    alone = results(clip, None)
    print(f"{FRAMES} frames of {SIZE}x{SIZE}, batch {BATCH}, float64; largest relative differences to one device\n")
    print("| mesh | forward | losses | gradients |\n|---|---:|---:|---:|")
    for mesh in args.meshes:
        found = results(clip, mesh)
        errors = [difference(*pair) for pair in zip(found, alone, strict=True)]
        print(f"| {mesh} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)


def results(clip: Any, text: str | None) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns latents and video, the losses of a step, and the gradients, by AdamW's first moments: a share of them."""
    import jax
    from flax import nnx

    from flax_vae.families.pyramid import CausalVideoVAE, narrow
    from flax_vae.metrics.lpips import LPIPS
    from flax_vae.runtime import sharded
    from flax_vae.runtime.mesh import make_mesh, parse_mesh
    from flax_vae.train.config import PRESETS, GanConfig, LossConfig, OptimizerConfig
    from flax_vae.train.discriminator import PatchDiscriminator
    from flax_vae.train.step import Trainer

    sizes = parse_mesh(text or "data=1")
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    config = replace(
        PRESETS["stage1"],
        clips=replace(PRESETS["stage1"].clips, batch=BATCH, frames=FRAMES, size=SIZE, images=0.0),
        loss=LossConfig(lpips_frames=4),
        gan=GanConfig("frames"),
        optimizer=OptimizerConfig(clip=1e9),
        remat=False,
    )
    object.__setattr__(config, "precision", "float64")  # a run has no such precision
    model = narrow((4, 8, 8, 8), groups=4, encoder_layers=1, decoder_layers=1)
    vae = wide(CausalVideoVAE(model, rngs=nnx.Rngs(0)))
    posterior = sharded.encode(vae, clip, mesh)
    forward = [posterior.mean, posterior.logvar, sharded.decode(vae, posterior.mean, mesh)]
    lpips = wide(LPIPS((16,) * 5, rngs=nnx.Rngs(1)))
    discriminator = wide(PatchDiscriminator((4, 6, 8), rngs=nnx.Rngs(2)))
    trainer = Trainer(config, vae, lpips, discriminator, mesh=mesh)
    state, metrics = trainer.step(trainer.start(), clip, with_gan=True)
    gradients = jax.tree.leaves([state.optimizer[1].mu, state.discriminator_optimizer[1].mu])
    return jax.device_get((forward, [metrics[name] for name in sorted(metrics)], gradients))


def wide(module: Any) -> Any:
    """Returns a module with ten times its random weights, which then matter, in float64."""
    import jax
    from flax import nnx

    structure, state = nnx.split(module)
    return nnx.merge(structure, jax.tree.map(lambda x: (10 * x if x.ndim > 1 else x).astype("float64"), state))


def difference(found: list[Any], expected: list[Any]) -> float:
    """Returns the largest difference of arrays, each relative to the largest value of its own.

    What is zero but for rounding, as the gradient by a bias that the next norm takes out again, is relative to that of
    all arrays.
    """
    import numpy as np

    scales = [np.abs(array).max() for array in expected]
    least = 1e-9 * max(scales)
    apart = [np.abs(a - b).max() for a, b in zip(found, expected, strict=True)]
    return float(max(x / (scale if scale > least else max(scales)) for x, scale in zip(apart, scales, strict=True)))


if __name__ == "__main__":
    main()
