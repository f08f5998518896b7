"""A training run in a folder: config.json, checkpoints, metrics.jsonl, broken.jsonl, pictures; it goes on by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_vae.io.files import locked, replacing
from flax_vae.io.manifest import read_entries
from flax_vae.io.picture import contact_sheet, psnr
from flax_vae.io.pixels import to_float
from flax_vae.models.config import VAEConfig
from flax_vae.models.vae import CausalVideoVAE
from flax_vae.train.checkpoints import Checkpoints
from flax_vae.train.config import TrainConfig
from flax_vae.train.data import batches
from flax_vae.train.log import MetricsLog
from flax_vae.train.lpips import LPIPS
from flax_vae.train.step import Trainer

SKIPPED = 5  # steps in a row that are not finite, after which the run goes back to its last checkpoint
RETURNS = 3  # how often it may go back without a good step between
PICTURES = 2  # clips that are looked at while training
CONFIG, METRICS, BROKEN, CHECKPOINTS = "config.json", "metrics.jsonl", "broken.jsonl", "checkpoints"


@dataclass(frozen=True)
class Record:
    """What one step has measured, and what it took: seconds in all, and of them those spent waiting for data."""

    step: int
    metrics: dict[str, float]
    frames: int
    seconds: float
    waited: float


class Run:
    """A run in the folder `out`: begun there, or gone on with where its last checkpoint is.

    `with Run(config, source, out) as run: for record in run.steps(): ...`, then `run.save()`. To stop is to leave the
    loop. Raises ValueError where the folder holds a run of another config, or another process is at it, or there is
    nothing to train on.
    """

    def __init__(self, config: TrainConfig, source: Path, out: Path):
        self.config, self.source, self.out = config, source, out
        self.entries = read_entries(source)

    def __enter__(self) -> Run:
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = locked(self.out / ".lock", f"{self.out}: another process trains here")
            stack.callback(lock.release)
            self._begin(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _begin(self, stack: contextlib.ExitStack) -> None:
        self._keep_config()
        lpips = LPIPS.from_pretrained() if self.config.loss.lpips else None
        self.trainer = Trainer(self.config, first_model(self.config), lpips)
        self.state = self.trainer.start()
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, self.config.keep)
        stack.callback(self.checkpoints.close)
        if self.checkpoints.newest() is not None:
            self.state, _ = self.checkpoints.restore(self.state)
        self.log = MetricsLog(self.out / METRICS, self.step)
        stack.callback(self.log.close)
        self.shown = self._clips_to_show()
        if self.step == 0:
            self.save()

    @property
    def step(self) -> int:
        """Batches so far."""
        return int(self.state.step)

    def steps(self) -> Iterator[Record]:
        """Trains to the last step and yields what each has measured; saves and draws as often as the config says."""
        data = batches(self.entries, self.config.data, self.config.seed, self.step, self.out / BROKEN)
        returns = 0
        for step in range(self.step, self.config.steps):
            began = time.perf_counter()
            frames = next(data)
            waited = time.perf_counter() - began
            with_gan = self.config.gan.kind != "none" and step >= self.config.gan.start
            self.state, metrics = self.trainer.step(self.state, frames, with_gan=with_gan)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            record = Record(step, values, frames.shape[0] * frames.shape[1], time.perf_counter() - began, waited)
            speed = {"frames_per_second": record.frames / record.seconds, "waited": waited / record.seconds}
            self.log.add(step, values | speed)
            yield record
            returns = self._after(step + 1, values, returns)

    def save(self, quality: float | None = None) -> None:
        """Begins to write a checkpoint of the state as it is."""
        self.checkpoints.save(self.step, self.state, {"config": dataclasses.asdict(self.config)}, quality)

    def _after(self, done: int, values: dict[str, float], returns: int) -> int:
        """Goes back where it must; saves and draws where it is time. Gives how often the run has gone back in a row."""
        if values["skipped"] >= SKIPPED:
            if returns == RETURNS:
                raise ValueError(f"{self.out}: losses are not finite; lower the learning rate, or use float32")
            self._go_back()
            return returns + 1
        quality = self.draw() if done % self.config.picture_every == 0 else None
        if quality is not None or done % self.config.save_every == 0:
            self.save(quality)
        return 0 if values["skipped"] == 0 else returns

    def _go_back(self) -> None:
        """Takes all but the place in the data from the last checkpoint."""
        self.checkpoints.wait()
        before, _ = self.checkpoints.restore(self.state)
        self.state = replace(before, step=self.state.step)
        self.save()

    def draw(self) -> float:
        """Draws input, reconstruction and difference of the clips that are shown, by the averaged weights; gives dB."""
        vae = self.trainer.vae(self.state.average)
        again = np.concatenate([np.asarray(reconstruct(vae, to_float(clip[None]))) for clip in self.shown])
        shown = to_float(self.shown)
        folder = self.out / "pictures"
        folder.mkdir(exist_ok=True)
        before, after = (x.reshape(-1, *x.shape[2:]) for x in (shown, again))
        contact_sheet(folder / f"{self.step:08d}.png", before, after, f"step {self.step}")
        return psnr(shown, np.clip(again, -1, 1))

    def _clips_to_show(self) -> np.ndarray:
        settings = replace(self.config.data, batch=PICTURES, images=0.0, workers=0, flip=False)
        return next(batches(self.entries, settings, self.config.seed + 1))

    def _keep_config(self) -> None:
        """Writes the config, or makes sure that it is the one with which the folder was begun."""
        path, ours = self.out / CONFIG, {**dataclasses.asdict(self.config), "source": str(self.source.absolute())}
        ours = json.loads(json.dumps(ours))
        if not path.exists():
            with replacing(path) as part:
                part.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
            return
        before, now = flat(json.loads(path.read_text(encoding="utf-8"))), flat(ours)
        if changed := [name for name, value in now.items() if before.get(name) != value]:
            listed = "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in changed)
            raise ValueError(
                f"{self.out}: holds a run of another config ({listed}): go on as begun, or write elsewhere"
            )


@nnx.jit
def reconstruct(vae: CausalVideoVAE, clip: Any) -> jax.Array:
    """Encodes a clip (B, T, H, W, 3) and decodes the means; compiled once for a model and a shape."""
    return vae.decode(vae.encode(clip).mode())


def first_model(config: TrainConfig) -> CausalVideoVAE:
    """Gives the model that a run starts from."""
    if config.init is not None:
        return CausalVideoVAE.from_pretrained(config.init)
    settings: VAEConfig = getattr(VAEConfig, config.model)()
    return CausalVideoVAE(replace(settings, remat=config.remat), rngs=nnx.Rngs(config.seed))


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Gives the values of nested dictionaries by their paths, as data.batch."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return values
