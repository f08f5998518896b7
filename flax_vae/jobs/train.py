"""Trains in the folder of a run, to the last step or until it is asked to stop, and shows how far it is."""

import logging
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import jax
import matplotlib  # noqa: F401  # needed at the first picture, so a missing one would be noticed too late
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flax_vae.io.manifest import whole_lines
from flax_vae.jobs.model import keep_compiled, open_mesh
from flax_vae.jobs.screen import console, note
from flax_vae.runtime.cluster import Cluster, anywhere, joined, noticing
from flax_vae.train.config import TrainConfig
from flax_vae.train.loop import BROKEN, Record, Run
from flax_vae.train.report import write_report

AVERAGED_STEPS = 50  # that the numbers on the screen are the mean of


def train(config: TrainConfig, data: Path, out: Path, mesh: str | None, fsdp: bool, cluster: Cluster) -> None:
    """Trains until the last step, or until a signal asks to stop; exits with 130 after Ctrl-C.

    Args:
      config: what decides over the run.
      data: a folder, a manifest or a clip.
      out: the folder of the run, which is gone on with where there is one.
      mesh: devices that share the work, as "data=4"; None is one device, or in a cluster all of them, by data.
      fsdp: whether the devices of data share the weights too.
      cluster: how to reach the other processes, if there are any.
    """
    keep_compiled()
    silence_orbax()
    with joined(cluster) as (process, processes):
        if processes > 1 and mesh is None:
            mesh = f"data={len(jax.devices())}"
        with Run(config, data, out, open_mesh(mesh, jax.devices), fsdp) as run, Stop() as stop, noticing():
            with shown(run) if process == 0 else nullcontext(lambda _: None) as show:
                for record in run.steps():
                    show(record)
                    if stop.is_asked_for():
                        break
            run.save()
            run.checkpoints.wait()
            done = run.step
    end(out, stop.signal, done, config.steps)
    if process == 0 and done == config.steps:
        note(f"wrote {write_report(out)}; weights: flax-vae export {out} my_vae")


def silence_orbax() -> None:
    """Keeps orbax from printing the errors that it also raises, in its log and in threads that it leaves behind."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def show(unraisable: Any) -> None:
        # After the first write that fails, the others find the event loop closed: a page of traceback for each.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = show


def end(out: Path, stopped: int | None, done: int, steps: int) -> None:
    """Notes what was left out, and how to go on with a run that was stopped."""
    lists = sorted(out.glob(BROKEN.replace(".", "*.")))  # one of each process
    if broken := {line for path in lists for line in whole_lines(path)}:
        note(f"{len(broken)} clips could not be read and were replaced by others: {', '.join(map(str, lists))}")
    if stopped:
        note(f"stopped by {signal.Signals(stopped).name} at step {done} of {steps}, saved; the same command goes on")
        if stopped == signal.SIGINT:
            sys.exit(130)


class Stop:
    """Whether SIGTERM or Ctrl-C has asked to stop, and which; to be looked at between steps, within `with Stop()`."""

    signal: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_asked_for(self) -> bool:
        """Whether any process of the cluster was asked to; all of them must call it after the same step."""
        agreed = anywhere(self.signal or 0)
        if agreed:  # otherwise a signal that came during the exchange stays, for after the next step
            self.signal = agreed
        return agreed != 0

    def ask(self, number: int, _frame: Any) -> None:
        """Handles a signal: keeps it for after the step; a second one interrupts."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        note("stopping after this step; once more to stop at once, without saving")


@contextmanager
def shown(run: Run) -> Iterator[Callable[[Record], None]]:
    """Notes what is trained on, then shows step, losses, frames per second, the wait for data, and the time left."""
    clips = [entry.kind for entry in run.entries]
    note(f"{run.source}: {clips.count('video')} videos, {clips.count('image')} images")
    note(f"data: about {run.frames_per_second:.0f} frames/s a reader, {run.readers} readers")
    if run.step:
        note(f"{run.out}: going on at step {run.step}")
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}")
    screen, recent = console(stderr=True), deque(maxlen=AVERAGED_STEPS)
    every = max(run.config.steps // 100, 1)
    ends = TextColumn("ETA"), TimeRemainingColumn()
    with Progress(*columns, *ends, console=screen, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=run.config.steps, completed=run.step, numbers="compiling")

        def show(record: Record) -> None:
            recent.append(record)
            numbers = summary(recent)
            progress.update(task, completed=record.step + 1, numbers=numbers)
            if not screen.is_terminal and (record.step + 1) % every == 0:
                note(f"step {record.step + 1} of {run.config.steps}: {numbers}")

        yield show


def summary(records: Sequence[Record]) -> str:
    """Returns the mean of the last steps in words; images and clips count alike."""

    def mean(name: str) -> float:
        values = [record.metrics[name] for record in records if name in record.metrics]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    seconds = sum(record.seconds for record in records)
    words = [f"loss {mean('total'):.4f}", f"PSNR {10 * np.log10(4 / mean('mse')):.2f} dB"]
    words += [f"{name} {mean(name):.3f}" for name in ("lpips", "gan", "discriminator") if name in records[-1].metrics]
    words += [f"{sum(record.frames for record in records) / seconds:.1f} frames/s"]
    words += [f"waiting for data {sum(record.waited for record in records) / seconds:.0%}"]
    skipped = sum(record.metrics["skipped"] > 0 for record in records)
    return ", ".join([*words, *([f"{skipped} skipped"] if skipped else [])])
