"""Budgets: memory told ahead is enough and not far off, the largest that fits is taken, too little is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_vae.families.pyramid import CausalVideoVAE, narrow
from flax_vae.runtime import memory as plan
from flax_vae.runtime.memory import cgroup_limits, format_bytes, largest, parse_bytes, step_bytes
from flax_vae.runtime.stream import Stream, compiled

hypothesis = pytest.importorskip("hypothesis", reason="sizes are drawn by hypothesis")
given, st = hypothesis.given, hypothesis.strategies

CONFIG = narrow((8, 8, 16, 16), groups=4, encoder_layers=1, decoder_layers=1)
GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("512MiB", 2**29),
        ("2TiB", 2**41),
        ("3KiB", 3072),
        ("4GB", 4 * 10**9),
        ("0.25 kb", 250),
        ("7 MB", 7 * 10**6),
        ("1TB", 10**12),
        (" 123456789 ", 123456789),
        ("42B", 42),
    ],
)
def test_amounts_of_memory_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4G", "four GiB", "-4GiB", "0", "0.1B", "nan", "1e9", "4GiB/s", "4 Gi B"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="as 4GiB"):
        parse_bytes(text)


@given(st.integers(1, 2**50 - 1))
def test_a_written_size_is_read_to_a_tenth_of_its_unit(size):
    written = format_bytes(size)
    unit = plan.UNITS[written.split()[1]]
    assert abs(parse_bytes(written) - size) <= unit / 20 + 1
    assert size < 1024 * unit


@given(st.integers(1, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_a_whole_number_of_a_unit_is_written_and_read_as_it_is(number, unit):
    assert format_bytes(number * plan.UNITS[unit]) == f"{number} {unit}"
    assert parse_bytes(f"{number} {unit}") == number * plan.UNITS[unit]


@given(st.lists(st.integers(0, 100), min_size=1025, max_size=1025), st.integers(0, 60_000), st.integers(1, 1024))
def test_the_largest_power_of_two_that_fits_is_found_for_any_growth(steps, budget, limit):
    bytes_of = [sum(steps[: n + 1]) for n in range(1025)].__getitem__
    fitting = [n for n in (2**i for i in range(11)) if n <= limit and bytes_of(n) <= budget]
    if fitting:
        assert largest(bytes_of, budget, limit) == fitting[-1]
    else:
        with pytest.raises(ValueError, match="are needed"):
            largest(bytes_of, budget, limit)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 10**9), st.integers(1, 2**20))
def test_little_is_compiled_to_find_it(fixed, each, room, limit):
    asked = []

    def bytes_of(n):
        asked.append(n)
        return fixed + each * n

    budget = fixed + each + room
    found = largest(bytes_of, budget, limit)
    assert bytes_of(found) <= budget
    assert len(asked) - 1 == len(set(asked[:-1])) <= 4
    assert found * 2 > limit or asked[0] != found


def test_no_size_at_all_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match=r"3 GiB are needed .* 2 GiB may be used: allow more memory, .*lossy"):
        largest(lambda n: (2 + n) * GIB, 2 * GIB, 8)
    with pytest.raises(ValueError, match="limit=0"):
        largest(lambda n: n, 2, 0)


@pytest.fixture(scope="module")
def steps():
    """The steps of a model that has no weights yet: their shapes are enough to plan."""
    vae = nnx.eval_shape(lambda: CausalVideoVAE(CONFIG, rngs=nnx.Rngs(0)))
    return {"encode": compiled(vae.encode_chunk), "decode": compiled(vae.decode_chunk)}


def shape_of(job, latents, batch=1, size=32):
    """Returns the shape of so many latents, or of the frames they are of; 0 stands for the first chunk of a stream."""
    if job == "encode":
        return jax.ShapeDtypeStruct((batch, max(8 * latents, 1), size, size, 3), jnp.float32)
    return jax.ShapeDtypeStruct((batch, max(latents, 1), size // 8, size // 8, 16), jnp.float32)


@pytest.fixture(scope="module")
def needed(steps):
    """Returns a function of the latents of a chunk, the clips of a batch and their size: the bytes of a stream."""
    return lambda job, *which: step_bytes(steps[job], shape_of(job, 0, *which[1:]), shape_of(job, *which))


@pytest.mark.slow
def test_more_latents_more_clips_and_larger_frames_need_more(needed):
    assert needed("encode", 1) < needed("encode", 2)
    assert needed("decode", 1) < needed("decode", 2)
    assert needed("decode", 1) < needed("decode", 1, 2)
    assert needed("decode", 1) < needed("decode", 1, 1, 48)


def test_the_weights_the_carry_and_the_result_are_counted(steps, needed, monkeypatch):
    monkeypatch.setattr(plan, "process_bytes", lambda arrays: arrays)
    weights = plan.tree_bytes(steps["decode"].args[2])
    _, carry = steps["decode"].trace(shape_of("decode", 0), None).out_info
    video, _ = steps["decode"].trace(shape_of("decode", 1), carry).out_info
    assert needed("decode", 1) > weights + 2 * plan.tree_bytes(video) + 3 * plan.tree_bytes(carry)


@pytest.mark.slow
def test_a_real_model_is_given_the_largest_chunk_that_fits(needed):
    enough = needed("decode", 2)
    assert largest(lambda n: needed("decode", n), enough, 4) == 2
    assert largest(lambda n: needed("decode", n), enough - 1, 4) == 1


def test_too_small_a_budget_is_refused_before_anything_is_run(steps, needed, monkeypatch):
    calls = []
    monkeypatch.setattr(type(steps["decode"]), "__call__", lambda *args: calls.append(args))
    with pytest.raises(ValueError, match="10 MiB may be used"):
        largest(lambda n: needed("decode", n), 10 * 2**20, 4)
    assert calls == []


def test_a_first_chunk_that_is_the_largest_is_refused(steps):
    with pytest.raises(ValueError, match="first chunk"):
        step_bytes(steps["decode"], shape_of("decode", 2), shape_of("decode", 1))


def test_the_program_that_was_compiled_to_plan_is_the_one_that_runs(caplog):
    class Next(nnx.Module):
        def step(self, x, carry):
            return (x if carry is None else x + carry), x[:, -1:]

    def compilations():
        return sum("Finished XLA compilation of jit(_call)" in message for message in caplog.messages)

    step, chunks = compiled(Next().step), [np.ones((1, frames, 2, 2, 3), np.float32) for frames in (1, 4, 4)]
    with jax.log_compiles():
        step_bytes(step, *(jax.ShapeDtypeStruct(chunk.shape, chunk.dtype) for chunk in chunks[:2]))
        assert compilations() == 1
        assert len(list(Stream(step, chunks))) == 3
        assert compilations() == 2


MEASURE = """
import json, os, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from flax_vae.families.pyramid import narrow
from flax_vae.families.pyramid import CausalVideoVAE
from flax_vae.runtime.memory import step_bytes
from flax_vae.runtime.stream import Stream, compiled

job, latents, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vae = CausalVideoVAE(narrow((8, 8, 16, 16), groups=4, encoder_layers=1, decoder_layers=1), rngs=nnx.Rngs(0))
step = compiled(getattr(vae, f"{job}_chunk"))
shape = lambda n: (1, 8 * n or 1, size, size, 3) if job == "encode" else (1, n or 1, size // 8, size // 8, 16)
rng = np.random.default_rng(0)
chunks = (rng.standard_normal(shape(n), np.float32) for n in (0, *[latents] * 4))
total = sum(float(np.asarray(jax.tree.leaves(result)[0]).sum()) for result in Stream(step, chunks))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
told = step_bytes(step, *(jax.ShapeDtypeStruct(shape(n), jnp.float32) for n in (0, latents)))
print(json.dumps({"peak": peak, "told": told}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(("job", "latents", "size"), [("decode", 2, 128), ("encode", 4, 128)])
def test_a_stream_takes_no_more_than_was_told_and_not_far_less(job, latents, size):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, job, str(latents), str(size)],
        cwd=Path(__file__).parents[2],
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(run.stdout)
    assert measured["peak"] <= measured["told"] <= 3 * measured["peak"]


STREAM = """
import sys
import numpy as np
import flax_vae

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(frames):
    rng = np.random.default_rng(0)
    chunks = (rng.standard_normal(shape(n), np.float32) for n in (0, *[2] * (frames // 16)))
    for result in getattr(flax_vae.stream, job)(vae, chunks):
        if reader == "waits":
            np.asarray(getattr(result, "mean", result))

job, reader = sys.argv[1:]
vae = flax_vae.CausalVideoVAE.from_pretrained("default")
shape = lambda n: (1, 8 * n or 1, 192, 192, 3) if job == "encode" else (1, n or 1, 24, 24, 16)
for _ in range(4):
    run(97)
print(peak())
run(961)
print(peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("reader", ["waits", "does not wait"])
@pytest.mark.parametrize("job", ["encode", "decode"])
def test_a_stream_of_ten_times_the_frames_takes_the_same_memory(job, reader):
    settings = ("XLA_", "JAX_", "MALLOC_")  # of the tests, not of who imports flax_vae
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    environment["JAX_PLATFORMS"] = "cpu"
    # By chance of threads and heaps, peaks of processes that do the same differ by a tenth, and one of few chunks may
    # have been lucky: so one process, and several short streams before the long one.
    command = [sys.executable, "-c", STREAM, job, reader]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, check=True)
    short, long = map(int, run.stdout.split())
    print(f"{job}, {reader}: {short // 1024} MiB for 97 frames, {long // 1024} for 961")
    assert long <= 1.05 * short


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_every_limit_above_a_process_is_found_in_both_versions_of_cgroups(tmp_path):
    assert list(cgroup_limits(tmp_path)) == []
    write(tmp_path, "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/jobs/mine\n3:cpuset:/\n0::/user/one\n")
    write(tmp_path, "sys/fs/cgroup/memory/jobs/mine/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", "3000\n")
    write(tmp_path, "sys/fs/cgroup/memory/other/memory.limit_in_bytes", "1\n")
    write(tmp_path, "sys/fs/cgroup/user/one/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "5000\n")
    write(tmp_path, "sys/fs/cgroup/cpuset/memory.limit_in_bytes", "2\n")
    assert sorted(cgroup_limits(tmp_path)) == [3000, 5000, 9223372036854771712]


def test_a_container_that_is_told_an_outer_path_finds_its_limit_at_the_top(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/docker/abc\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "4096\n")
    assert list(cgroup_limits(tmp_path)) == [4096]


def test_on_a_cpu_half_of_the_memory_or_of_a_lower_limit_may_be_used(monkeypatch):
    monkeypatch.setattr(plan, "physical_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(plan, "cgroup_limits", lambda: iter([2**63, 6 * GIB]))
    assert plan.available_bytes() == 3 * GIB
    monkeypatch.setattr(plan, "cgroup_limits", lambda: iter([]))
    assert plan.available_bytes() == 4 * GIB
    monkeypatch.undo()
    assert plan.available_bytes() == plan.available_bytes() > 0


def test_on_other_devices_a_share_of_what_jax_may_allocate(monkeypatch):
    device = SimpleNamespace(platform="gpu", device_kind="A card", memory_stats=lambda: {"bytes_limit": 10 * GIB})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert plan.available_bytes() == 9 * GIB
    device.memory_stats = lambda: None
    with pytest.raises(ValueError, match="A card does not tell its memory"):
        plan.available_bytes()
