"""Several processes as one: what they make together is what one makes alone, and where one is killed all end."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from flax_vae import CausalVideoVAE
from flax_vae.io.latents import Latents
from flax_vae.io.manifest import read_entries
from flax_vae.jobs.train import Stop
from flax_vae.runtime import cluster
from flax_vae.runtime.cluster import GONE_MESSAGE, Cluster, check, noticing
from flax_vae.runtime.mesh import process_share
from flax_vae.train.averaged import averaged
from flax_vae.train.config import ClipConfig
from flax_vae.train.data import batches, rows_of
from tests.little import ONE_BLOCK
from tests.patience import PATIENCE

for package, what in (("av", "clips"), ("grain", "data"), ("orbax", "checkpoints"), ("matplotlib", "pictures")):
    pytest.importorskip(package, reason=f"{what} need {package}")
pytest.importorskip("tyro", reason="the command line needs tyro")

ROOT = Path(__file__).parents[2]
ONE_DEVICE = {"XLA_FLAGS": ""}
LOSSES = ("total", "mse", "l1")
SPEED = ("seconds", "frames_per_second", "waited")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A checkpoint of the smallest model, which compiles fast."""
    folder = tmp_path_factory.mktemp("vae")
    CausalVideoVAE(ONE_BLOCK, rngs=nnx.Rngs(0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips that move, one that is none, and an image."""
    from flax_vae.io.video_writer import VideoWriter, write_image

    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for number in range(3):
        picture = rng.integers(0, 256, (24, 32, 3), np.uint8)
        with VideoWriter(folder / f"{number}.mkv", 25, 24, 32, lossless=True) as writer:
            writer.write(np.stack([np.roll(picture, i, axis=1) for i in range(12)]))
    (folder / "broken.mp4").write_text("no video")
    write_image(folder / "image.png", picture)
    return folder


@dataclass
class Host:
    """A command that runs, and the file that its messages go to."""

    process: subprocess.Popen
    said: Path

    def ended(self, patience: float = PATIENCE) -> int:
        """Waits for the end; returns the exit code."""
        return self.process.wait(patience)


@dataclass
class Hosts:
    """Starts commands, alone or as a cluster on this machine, and leaves none behind."""

    folder: Path
    cache: Path
    started: list[Host] = field(default_factory=list)

    def start(self, *words: object) -> Host:
        """Starts `flax-vae` with these arguments."""
        said = self.folder / f"host-{len(self.started)}.txt"
        command = [sys.executable, "-m", "flax_vae", *map(str, words)]
        env = os.environ | ONE_DEVICE | {"JAX_COMPILATION_CACHE_DIR": str(self.cache)}
        with open(said, "w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=env)
        self.started.append(Host(process, said))
        return self.started[-1]

    def cluster(self, *words: object, count: int = 2) -> list[Host]:
        """Starts them in as many processes, which are a cluster."""
        where = "--coordinator", f"127.0.0.1:{free_port()}", "--processes", count
        return [self.start(*words, *where, "--process", number) for number in range(count)]

    def run(self, *words: object, count: int = 1) -> list[str]:
        """Runs them to a good end, alone or as a cluster, and returns what each process said."""
        hosts = self.cluster(*words, count=count) if count > 1 else [self.start(*words)]
        for host in hosts:
            assert host.ended() == 0, host.said.read_text()[-3000:]
        return [host.said.read_text() for host in hosts]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for what is compiled, so that each program is once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def hosts(tmp_path, cache):
    """Yields what starts commands, and kills those that are left."""
    hosts = Hosts(tmp_path, cache)
    yield hosts
    for host in hosts.started:
        host.process.kill()
        host.process.wait()


def wait_for_steps(out: Path, steps: int, hosts: list[Host]) -> None:
    """Waits until a run has done so many steps."""
    patience = time.monotonic() + PATIENCE
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < steps:
        assert all(host.process.poll() is None for host in hosts), [host.said.read_text() for host in hosts]
        assert time.monotonic() < patience
        time.sleep(0.01)


def free_port() -> int:
    """Returns a port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster("host:1"), "add --processes, --process"),
        (Cluster("host:1", 2), "add --process$"),
        (Cluster(processes=2, process=0), "add --coordinator"),
        (Cluster("host:1", 2, 2), "expected a number from 0 to one less"),
        (Cluster("host:1", 2, -1), "expected a number from 0 to one less"),
        (Cluster("host:1", 0, 0), "expected a number from 0 to one less"),
        (Cluster("host", 2, 1), "--coordinator host: expected HOST:PORT"),
        (Cluster("host:port", 2, 1), "expected HOST:PORT"),
        (Cluster("host:99999", 2, 1), "expected HOST:PORT"),
        (Cluster("host:1", 2, 1, wait=0), "--wait 0"),
        (Cluster("host:1", cluster=True), "leave --coordinator, --processes and --process out"),
    ],
)
def test_what_joins_no_cluster_is_said(cluster, message):
    assert cluster.is_asked_for
    with pytest.raises(ValueError, match=message):
        check(cluster)


def test_a_cluster_that_fits_together_is_none_of_errors():
    check(Cluster("[::1]:8476", 2, 1))
    check(Cluster(cluster=True))
    assert not Cluster().is_asked_for


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (4, 2), (6, 3), (8, 8)])
def test_rows_of_all_parts_are_the_batch(batch, parts):
    assert [row for part in range(parts) for row in rows_of(batch, (part, parts))] == list(range(batch))


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ValueError, match="2 processes cannot share 3 clips"):
        rows_of(3, (0, 2))


@pytest.mark.parametrize("parts", [2, 4])
def test_what_processes_read_is_the_batch_of_one(clips, parts):
    config, entries = ClipConfig(frames=9, size=16, batch=4, images=0.4, image_batch=8), read_entries(clips)

    def read(share):
        return list(itertools.islice(batches(entries, config, 7, 3, share=share), 6))

    shares = zip(*(read((part, parts)) for part in range(parts)), strict=True)
    for whole, share in zip(read((0, 1)), shares, strict=True):
        assert {len(rows) for rows in share} == {len(whole) // parts}
        np.testing.assert_array_equal(np.concatenate(share), whole)


@pytest.mark.parametrize(("rows", "processes"), [(2, 2), (6, 2), (8, 4)])
def test_every_process_has_a_part_of_its_own_of_the_clips(rows, processes, monkeypatch, unchecked):
    owners = [row * processes // rows for row in range(rows)]
    devices = np.array([[SimpleNamespace(process_index=owner)] * 2 for owner in owners]).reshape(rows, 1, 2, 1)
    mesh: Any = SimpleNamespace(devices=devices, shape={"data": rows, "height": 2})
    for number in range(processes):
        monkeypatch.setattr("flax_vae.runtime.mesh.process", lambda number=number: (number, processes))
        assert process_share(mesh) == (number, processes)
    mesh.devices = devices[1:]
    with pytest.raises(ValueError, match=f"clips cross from one of {processes} processes to another"):
        process_share(mesh)


def test_what_one_process_is_asked_all_are(monkeypatch):
    monkeypatch.setattr(cluster, "process", lambda: (0, 3))
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda x: np.array([x, 15, 2]))
    assert cluster.anywhere(0) == 15
    assert cluster.anywhere(20) == 20


def test_a_signal_that_comes_while_processes_agree_counts_after_the_next_step(monkeypatch):
    stop = Stop()

    def agree_meanwhile(number):
        stop.ask(signal.SIGTERM, None)
        return number

    with monkeypatch.context() as patch:
        patch.setattr("flax_vae.jobs.train.anywhere", agree_meanwhile)
        assert not stop.is_asked_for()
    assert stop.is_asked_for()
    assert stop.signal == signal.SIGTERM


@pytest.mark.slow
def test_processes_that_wait_in_vain_say_so(hosts, vae, clips):
    words = "extract", clips, hosts.folder / "out", "--weights", vae
    where = "--processes", 2, "--wait", 3, "--coordinator"
    alone = [hosts.start(*words, *where, f"127.0.0.1:{free_port()}", "--process", number) for number in (0, 1)]
    for host in alone:
        assert host.ended() == 2
        assert "did not all start within 3 s" in host.said.read_text()


def test_a_part_and_a_cluster_are_too_much(run, vae, clips, tmp_path):
    words = "extract", clips, tmp_path / "out", "--weights", vae
    code, _, err = run(*words, "--part", "1/2", "--coordinator", "localhost:1", "--processes", 2, "--process", 0)
    assert code == 2
    assert "--part 1/2: in a cluster each process does the part of its number" in err


@pytest.mark.slow
def test_two_processes_extract_what_one_does(hosts, run, vae, clips):
    one, two = (hosts.folder / name for name in ("one", "two"))
    assert run("extract", clips, one, "--weights", vae)[0] == 0
    hosts.run("extract", clips, two, "--weights", vae, count=2)
    assert sorted(path.name for path in two.glob("log-*")) == [f"log-0000{k}-of-00002.jsonl" for k in (1, 2)]
    for name in ("manifest.jsonl", "failed.jsonl"):
        assert (two / name).read_text() == (one / name).read_text()
    for path in (one / "latents").iterdir():
        for kind in ("mean", "logvar"):  # side by side with more clips or fewer, so not to the bit
            ours, theirs = (Latents(folder / "latents" / path.name).read(kind) for folder in (two, one))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    stated = [json.loads((folder / "statistics.json").read_text()) for folder in (one, two)]
    for place in ("first", "rest"):
        np.testing.assert_allclose(stated[0][place]["mean"], stated[1][place]["mean"], atol=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(hosts, vae, clips):
    words = "eval", vae, clips, "--no-lpips", "--no-fvd", "--out"
    (one,) = hosts.run(*words, hosts.folder / "one")
    first, second = hosts.run(*words, hosts.folder / "two", count=2)
    found = [json.loads((hosts.folder / name / "eval.json").read_text()) for name in ("one", "two")]
    assert found[0] == found[1]
    assert (hosts.folder / "one" / "eval.png").read_bytes() == (hosts.folder / "two" / "eval.png").read_bytes()
    assert "mean of 4 clips" in one
    assert "mean of 4 clips" in first
    assert "mean of" not in second


def training(vae: Path, clips: Path, out: Path, steps: int = 4, *more: object) -> list[object]:
    """Returns the words of a short training run, which saves after each step."""
    words = ["train", "--data", clips, "--out", out, "--init", vae, "--steps", steps, "--save-every", 1]
    words += ["--picture-every", 100, "--clips.size", 16, "--clips.batch", 2, "--clips.image-batch", 2]
    return [*words, "--clips.images", 0.3, "--optimizer.kind", "adamw", "--optimizer.warmup", 2, *more]


def metrics(out: Path) -> list[dict[str, float]]:
    """Reads what a run has measured, but for its speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def check_close(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Compares the metrics of every step: what divides by gradients near zero, as AdamW does, drifts the most."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            tolerance = 1e-6 if name in LOSSES else 1e-3
            assert one[name] == pytest.approx(other[name], rel=tolerance), (name, one["step"])


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_one_goes_on_with_it(hosts, vae, clips):
    one, two = (hosts.folder / name for name in ("one", "two"))
    hosts.run(*training(vae, clips, one))
    hosts.run(*training(vae, clips, two), count=2)
    check_close(metrics(two), metrics(one))
    names = {path.relative_to(one) for path in one.rglob("*.*") if "checkpoints" not in path.parts}
    assert names <= {path.relative_to(two) for path in two.rglob("*.*")}

    shutil.rmtree(two / "checkpoints" / "4")  # as if the two had ended in the middle
    hosts.run(*training(vae, clips, two))
    check_close(metrics(two), metrics(one))
    assert averaged(two)[1] == 4


GLOO = RuntimeError("UNKNOWN: Gloo AllGather failed: connection closed by peer")


@pytest.mark.parametrize(
    ("error", "cause", "is_noticed"),
    [
        (GLOO, None, True),
        (OSError("a checkpoint could not be written"), GLOO, True),
        (OSError("Gloomy/checkpoints: no space left"), None, False),
        (RuntimeError("out of memory"), None, False),
    ],
)
def test_an_error_says_that_another_process_is_gone_also_where_it_came_up_in_a_write(
    error, cause, is_noticed, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "is_joined", lambda: True)
    monkeypatch.setattr(cluster, "leave", sys.exit)
    with pytest.raises(SystemExit if is_noticed else type(error)), noticing():
        raise error from cause
    assert (GONE_MESSAGE in capsys.readouterr().err) == is_noticed


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_training_goes_on_to_the_same_numbers_after_one_was_killed(hosts, vae, clips, killed):
    whole, out = (hosts.folder / name for name in ("whole", "killed"))
    hosts.run(*training(vae, clips, whole, 12), count=2)
    pair = hosts.cluster(*training(vae, clips, out, 12))
    wait_for_steps(out, 3, pair)
    pair[killed].process.kill()
    assert pair[1 - killed].ended(60) != 0
    said = pair[1 - killed].said.read_text()
    assert GONE_MESSAGE in said or "another task died" in said  # jax may be the first to notice
    hosts.run(*training(vae, clips, out, 12), count=2)
    assert metrics(out) == metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_at_one_process_saves_and_ends_all_at_the_same_step(hosts, vae, clips, asked):
    pair = hosts.cluster(*training(vae, clips, hosts.folder / "run", 100_000))
    wait_for_steps(hosts.folder / "run", 3, pair)
    pair[asked].process.terminate()
    said = [(host.ended(), host.said.read_text()) for host in pair]
    assert [code for code, _ in said] == [0, 0], said
    done = len(metrics(hosts.folder / "run"))
    assert averaged(hosts.folder / "run")[1] == done
    for _, text in said:
        assert f"stopped by SIGTERM at step {done} of 100000, saved" in text


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_an_error_in_all(hosts, vae, clips):
    for host in hosts.cluster(*training(vae, clips, hosts.folder / "run", 4, "--clips.batch", 3)):
        assert host.ended() == 2
        assert "2 processes cannot share 3 clips" in host.said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_others_end(hosts, vae, clips, killed):
    words = "extract", clips, hosts.folder / "out", "--weights", vae
    pair = hosts.cluster(*words)
    patience = time.monotonic() + PATIENCE
    while not list((hosts.folder / "out").glob("log-*")):
        assert time.monotonic() < patience
        time.sleep(0.05)
    pair[killed].process.send_signal(signal.SIGKILL)
    assert pair[1 - killed].ended(60) != 0
    assert hosts.run(*words, count=2)
