"""`flax-vae train`."""

from __future__ import annotations

import logging
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from flax_vae.cli.options import NO_CLUSTER, Mesh, Processes
from flax_vae.jobs.screen import note
from flax_vae.runtime.cluster import Cluster, anywhere, joined, noticing
from flax_vae.train.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    from flax_vae.train.loop import Record, Run

Data = Annotated[
    Path,
    arg(
        metavar="FOLDER|MANIFEST",
        help='videos and images: a folder, with the folders in it, or lines of {"video": path} or {"image": path}',
    ),
]
Out = Annotated[
    Path, arg(metavar="DIR", help="folder of the run; where it holds a run of this very config, that is gone on with")
]
Preset = Annotated[
    Literal["tiny", "stage1", "stage2"],
    arg(
        help="what all other settings are by default. tiny: minutes on a CPU; stage1: the public recipe, clips of 17 "
        "frames of 256 x 256 and a tenth images; stage2: clips of 57 frames alone"
    ),
]
Fsdp = Annotated[
    bool,
    FlagCreatePairsOff,
    arg(
        help="with --mesh: the devices of data share the weights and the optimizer too, each keeping a part of them "
        "and sending it to the others when it is needed",
        help_behavior_hint="",
    ),
]
SHOWN = 50  # steps over which the numbers on the screen are averaged


def with_preset(args: Sequence[str]) -> Callable[..., None]:
    """Gives the command with the defaults of the preset that the arguments name."""
    named = [after for before, after in pairwise(args) if before == "--preset"]
    named += [word.removeprefix("--preset=") for word in args if word.startswith("--preset=")]
    chosen: Any = named[-1] if named and named[-1] in PRESETS else "tiny"

    def train(
        data: Data,
        out: Out,
        preset: Preset = chosen,
        mesh: Mesh = None,
        fsdp: Fsdp = False,
        cluster: Processes = NO_CLUSTER,
        config: Annotated[TrainConfig, arg(name="")] = PRESETS[chosen],
    ) -> None:
        run(config, data, out, mesh, fsdp, cluster)

    train.__doc__ = TRAIN
    return train


TRAIN = """Trains a VAE on videos and images, with the losses of the public recipe; stops and goes on at any moment.

DIR gets config.json, metrics.jsonl (a line a step), checkpoints, pictures of what is lost (input, reconstruction,
difference), broken.jsonl (what could not be read) and, at the end, report.png. The same command again goes on where
the last checkpoint is, to the same numbers; SIGTERM and Ctrl-C save first. flax-vae export then writes the weights,
averaged over the last steps, in the public layout.

Example:
  flax-vae train --preset tiny --data clips --out my_run --steps 2000 --clips.size 64
"""


def run(config: TrainConfig, data: Path, out: Path, mesh: str | None, fsdp: bool, cluster: Cluster) -> None:
    """Trains until the last step, or until it is asked to stop."""
    import matplotlib  # noqa: F401  # needed at the first picture, so a missing one would be noticed too late
    from jax import devices

    from flax_vae.jobs.model import keep_compiled, open_mesh
    from flax_vae.train.loop import Run
    from flax_vae.train.report import write_report

    keep_compiled()
    without_echoes_of_orbax()
    with joined(cluster) as (process, processes):
        if processes > 1 and mesh is None:
            mesh = f"data={len(devices())}"
        with Run(config, data, out, open_mesh(mesh, devices), fsdp) as training, stopping() as stop, noticing():
            with begun(training) if process == 0 else nullcontext(lambda _: None) as show:
                for record in training.steps():
                    show(record)
                    if stop.is_asked_for():
                        break
            training.save()
            training.checkpoints.wait()
            done = training.step
    end(out, stop.signal, done, config.steps)
    if process == 0 and done == config.steps:
        note(f"wrote {write_report(out)}; weights: flax-vae export {out} my_vae")


def without_echoes_of_orbax() -> None:
    """Keeps orbax from printing the errors that it raises, in its log and in threads that it leaves behind."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def show(unraisable: Any) -> None:
        # After the first write that fails, the others find the loop that waited for them closed: a page for each.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = show


def begun(training: Run) -> AbstractContextManager[Callable[[Record], None]]:
    """Says what is about to be trained, on what, and from which step on, and shows how far it is."""
    clips = [entry.kind for entry in training.entries]
    note(f"{training.source}: {clips.count('video')} videos, {clips.count('image')} images")
    note(f"data: about {training.frames_per_second:.0f} frames/s a reader, {training.readers} readers")
    if training.step:
        note(f"{training.out}: going on at step {training.step}")
    return bar(training)


def end(out: Path, stopped: int | None, done: int, steps: int) -> None:
    """Says what was left out, and how to go on with a run that was stopped."""
    from flax_vae.io.manifest import whole_lines
    from flax_vae.train.loop import BROKEN

    lists = sorted(out.glob(BROKEN.replace(".", "*.")))  # one of each process
    if broken := {line for path in lists for line in whole_lines(path)}:
        note(f"{len(broken)} clips could not be read and were replaced by others: {', '.join(map(str, lists))}")
    if stopped:
        note(f"stopped by {signal.Signals(stopped).name} at step {done} of {steps}, saved; the same command goes on")
        if stopped == signal.SIGINT:
            sys.exit(130)


class Stop:
    """Whether the process was asked to stop, and by which signal."""

    signal: int | None = None

    def is_asked_for(self) -> bool:
        """Tells whether any process of the cluster was asked to; all of them must call it after the same step."""
        agreed = anywhere(self.signal or 0)
        if agreed:  # else a signal that has come while the others were waited for stays, for after the next step
            self.signal = agreed
        return agreed != 0

    def ask(self, number: int, _frame: Any) -> None:
        """Notes the signal, for after the step; a second one interrupts."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        note("stopping after this step; once more to stop at once, without saving")


@contextmanager
def stopping() -> Iterator[Stop]:
    """Turns SIGTERM and Ctrl-C into a wish to stop, which is to be looked for between steps."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def bar(training: Run) -> Iterator[Callable[[Record], None]]:
    """Shows step, losses, PSNR, frames per second, how long data is waited for, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}")
    ends = TextColumn("ETA"), TimeRemainingColumn()
    console, recent = Console(stderr=True), deque(maxlen=SHOWN)
    every = max(training.config.steps // 100, 1)
    with Progress(*columns, *ends, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=training.config.steps, completed=training.step, numbers="compiling")

        def show(record: Record) -> None:
            recent.append(record)
            numbers = summary(recent)
            progress.update(task, completed=record.step + 1, numbers=numbers)
            if not console.is_terminal and (record.step + 1) % every == 0:
                note(f"step {record.step + 1} of {training.config.steps}: {numbers}")

        yield show


def summary(records: Sequence[Record]) -> str:
    """Puts the last steps in words; images and clips are averaged alike."""
    import numpy as np

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


train = with_preset(())
