"""A training run in a folder: config.json, checkpoints, metrics.jsonl, broken.jsonl, pictures.

The same config continues it from its last checkpoint. B batch, T frames, H W pixels.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from flax_vae.families import registry
from flax_vae.io.checkpoint import open_checkpoint
from flax_vae.io.files import PathLike, locked, read_json, replacing, to_json
from flax_vae.io.manifest import as_json, read_entries
from flax_vae.io.pixels import to_float
from flax_vae.layers.conv import INIT_STD
from flax_vae.layers.sequence import Execution
from flax_vae.metrics.lpips import LPIPS
from flax_vae.models.config import VAEConfig
from flax_vae.models.vae import VideoVAE
from flax_vae.runtime.cluster import allgather, check_same, process
from flax_vae.runtime.mesh import process_share
from flax_vae.runtime.parallel import replicate
from flax_vae.train.averaged import MODEL
from flax_vae.train.checkpoints import CHECKPOINTS, UNKNOWN_QUALITY, Checkpoints
from flax_vae.train.config import TrainConfig, check, upgraded
from flax_vae.train.data import batches, readers, rows_of
from flax_vae.train.discriminator import PatchDiscriminator
from flax_vae.train.history import save_snapshot
from flax_vae.train.log import MetricsLog
from flax_vae.train.step import Trainer

MAX_SKIPPED = 5  # steps in a row that are not finite, after which the run goes back to its last checkpoint
MAX_RETURNS = 3  # to a checkpoint, without a finite step between them
SHOWN_CLIPS = 2  # in pictures
CONFIG, BROKEN = "config.json", "broken.jsonl"
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The metrics of a step, its frames, and its time: seconds in all, and of these those spent waiting for data."""

    step: int
    metrics: dict[str, float]
    frames: int
    seconds: float
    waited: float


class Run:
    """A run in the folder `out`, new or continued from its last checkpoint.

    `with Run(config, source, out) as run: for record in run.steps(): ...`, then `run.save()`; leaving the loop stops
    the run. In a cluster every process makes the same `Run`, on a mesh of all devices, and reads its own clips of every
    batch; process 0 writes everything but the checkpoints, which all write. A run may continue on another mesh.

    The source is a folder of clips, or a manifest. With `fsdp` the devices of `data` shard the weights too. Raises
    ValueError where the folder is of another config or in use, settings are not possible, or there is no clip.
    """

    def __init__(
        self, config: TrainConfig, source: PathLike, out: PathLike, mesh: Mesh | None = None, fsdp: bool = False
    ):
        self.config, self.source, self.out = config, Path(source), Path(out)
        self.mesh, self.fsdp = mesh, fsdp
        self.share = process_share(mesh)
        self.is_first = process()[0] == 0
        self.broken = self.out / (BROKEN if self.is_first else BROKEN.replace(".", f"-{process()[0]}."))
        check(config, model_config(config))
        if self.out.absolute().is_relative_to(self.source.absolute()):
            raise ValueError(f"{out}: lies in the data; train into another folder")
        self.entries = read_entries(source)
        for batch in (config.clips.batch, config.clips.image_batch):
            rows_of(batch, self.share)  # raises where the processes cannot share it
        check_same((self.settings, [entry.path for entry in self.entries]), "config and clips")

    def __enter__(self) -> "Run":
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.is_first:
                lock = locked(self.out / ".lock", f"{self.out}: another process trains here")
                stack.callback(lock.release)
            self._begin(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _begin(self, stack: contextlib.ExitStack) -> None:
        check_config(self.out / CONFIG, self.settings)
        self._draw_shown_clips()
        lpips = LPIPS.from_pretrained() if self.config.loss.lpips else None
        vae = first_model(self.config)
        discriminator = PatchDiscriminator.from_pretrained(init) if (init := self.config.gan.init) else None
        self.trainer = Trainer(self.config, vae, lpips, discriminator, mesh=self.mesh, fsdp=self.fsdp)
        if self.is_first:
            keep_json(self.out / CONFIG, self.settings)
            keep_json(self.out / MODEL, vae.config.to_dict())
        self.state = self.trainer.start()
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, self.config.keep)
        stack.callback(self.checkpoints.close)
        self._saved = self.checkpoints.newest()
        if self._saved is not None:
            self.state = self.checkpoints.restore(self.state)
        self.log = None
        if self.is_first:
            self.log = MetricsLog(self.out, self.step)
            stack.callback(self.log.close)
        if self._saved is None:
            self.save(self.draw())

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the run, as config.json holds it."""
        return {**dataclasses.asdict(self.config), "source": str(self.source.absolute())}

    @property
    def step(self) -> int:
        """Number of batches so far."""
        return int(self.state.step)

    def steps(self) -> Iterator[Record]:
        """Trains to the last step, yields the record of each, and saves and draws as often as the config says."""
        data = batches(self.entries, self.config.clips, self.config.seed, self.step, self.broken, share=self.share)
        returns = 0
        for step in range(self.step, self.config.steps):
            began = time.perf_counter()
            frames = next(data)
            waited = time.perf_counter() - began
            self.state, metrics = self.trainer.step(self.state, frames, with_gan=self.config.gan.takes_part(step))
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            count = frames.shape[0] * frames.shape[1] * self.share[1]
            took = time.perf_counter() - began
            if self.log is not None:
                speed = {"seconds": took, "frames_per_second": count / took, "waited": waited / took}
                self.log.add(step, values | speed)
            yield Record(step, values, count, took, waited)
            returns = self._after(step + 1, values, returns)

    def save(self, quality: float = UNKNOWN_QUALITY) -> None:
        """Starts to write a checkpoint of the current state, unless there is one; `quality` is a PSNR in dB."""
        if self._saved != self.step:
            self.checkpoints.save(self.step, self.state, quality)
            self._saved = self.step

    def _after(self, done: int, values: dict[str, float], returns: int) -> int:
        """Goes back to a checkpoint, saves or draws where it is time; returns the number of returns in a row."""
        if values["skipped"] >= MAX_SKIPPED:
            if returns == MAX_RETURNS:
                raise ValueError(f"{self.out}: losses are not finite; lower the learning rate, or use float32")
            self.checkpoints.wait()
            before = self.checkpoints.restore(self.state)
            message = "%s: %d steps in a row were not finite; going back to the weights of step %d"
            LOGGER.warning(message, self.out, MAX_SKIPPED, int(before.step))
            self.state = replace(before, step=self.state.step)  # the position in the data stays
            self.save()
            return returns + 1
        is_shown = done % self.config.picture_every == 0 or done == self.config.steps
        if is_shown or done % self.config.save_every == 0:
            self.save(self.draw() if is_shown else UNKNOWN_QUALITY)
        return 0 if values["skipped"] == 0 else returns

    def draw(self) -> float:
        """Draws the shown clips beside their reconstructions by the ema of the weights; returns the PSNR in dB."""
        ema, quality = self.state.ema if self.mesh is None else replicate(self.state.ema, self.mesh), 0.0
        if self.is_first:
            vae = self.trainer.vae(jax.tree.map(lambda leaf: leaf.addressable_data(0), ema))
            output = [np.asarray(reconstruct(vae, to_float(clip[None]))) for clip in self.shown]
            quality = save_snapshot(self.out, self.step, to_float(self.shown), np.concatenate(output))
        return allgather(quality)[0]

    def _draw_shown_clips(self) -> None:
        """Draws the clips to show from the data, which fails where none can be read, and measures how long it takes."""
        images, count = float(all(entry.kind == "image" for entry in self.entries)), SHOWN_CLIPS
        settings = replace(self.config.clips, batch=count, image_batch=count, images=images, workers=0, flip=False)
        began = time.perf_counter()
        self.shown = next(batches(self.entries, settings, self.config.seed + 1))
        self.readers = readers(self.config.clips)
        self.frames_per_second = self.shown.shape[0] * self.shown.shape[1] / (time.perf_counter() - began)


def check_config(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where the file holds other settings than these; those of earlier versions are translated."""
    if not path.exists():
        return
    before, now = (flatten_dict(values, sep=".") for values in (upgraded(read_json(path)), as_json(settings)))
    if changed := [name for name in before | now if before.get(name) != now.get(name)]:
        listed = "; ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in changed)
        raise ValueError(f"{path.parent}: holds a run of another config ({listed}): go on as begun, or write elsewhere")


def keep_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a file where there is none."""
    if not path.exists():
        with replacing(path) as part:
            part.write_text(to_json(as_json(values), indent=2) + "\n", encoding="utf-8")


@nnx.jit
def reconstruct(vae: VideoVAE, clip: Any) -> jax.Array:
    """Encodes a clip (B, T, H, W, C) and decodes the means."""
    return vae.decode(vae.encode(clip).mode())


def model_config(config: TrainConfig) -> VAEConfig:
    """Returns the config of the model that a run trains."""
    return registry.preset(config.model) if config.init is None else registry.read_config(open_checkpoint(config.init))


def first_model(config: TrainConfig) -> VideoVAE:
    """Returns the model that a run starts from."""
    model = model_config(config)
    if config.init is None:
        make: Any = registry.family_of(model)
        vae = with_init_std(make(model, rngs=nnx.Rngs(config.seed)), config.init_std)
    else:
        vae = registry.from_pretrained(config.init, config=model)
    vae.execution = Execution(config.remat, config.frame_by_frame)
    return vae


def with_init_std(model: VideoVAE, init_std: float | None) -> VideoVAE:
    """Scales random kernels to this standard deviation, or, with None, to 1/sqrt(inputs of an output)."""
    for kernel in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Param)):
        if kernel.ndim > 1:
            kernel[...] *= (init_std or math.prod(kernel.shape[:-1]) ** -0.5) / INIT_STD
    return model
