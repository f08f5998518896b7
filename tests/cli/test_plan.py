"""flax-vae plan: what is asked for, what is tried, and what is said; compiled for virtual devices, and TPUs."""

import json
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("tyro", reason="the command line needs tyro")
pytest.importorskip("rich", reason="the command line needs rich")

from flax_vae.planning import compile_ahead as ahead
from flax_vae.planning import search as plan_search
from flax_vae.planning import worker as planned
from flax_vae.planning.chips import CHIPS, GIB, parse_topology
from flax_vae.planning.describe import verdict
from flax_vae.planning.hlo import Collective, Program
from flax_vae.planning.measure import measured, refused
from flax_vae.planning.roofline import seconds
from flax_vae.planning.wanted import Wanted, request_of, with_mesh

needs_tpu_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu")
TINY = ("--preset", "tiny", "--frames", "9", "--size", "32", "--json")


def request(topology="v5e:2x2", **wanted):
    return request_of(Wanted(topology, **{"batch": 8, **wanted}))


def report(needed, fits, request=None, time=1.0):
    request = request or replace(globals()["request"](), mesh={"data": 4})
    times = {"flops": time, "memory": time / 2, "interconnect": 0.0} if fits else None
    bound = "flops" if fits else None
    return ahead.Report(request, 4, "TPU v5 lite", needed, 16 * GIB, fits, seconds=times, bound=bound)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_chip_has_an_example_that_is_read(chip):
    topology = parse_topology(chip.example)
    assert (topology.chip, topology.platform) == (chip, "tpu")
    assert topology.devices == {"v4": 4, "v5e": 16, "v5p": 8, "v6e": 16, "v7x": 8}[chip.name]
    assert chip.source.startswith("https://docs.cloud.google.com/tpu/docs/")


def test_names_of_the_runtime_are_its_own():
    assert parse_topology("v7x:2x2x1").runtime_name == "tpu7x:2x2x1"
    assert parse_topology("v4:2x2x1").options == {"chip_config_name": "megacore"}
    assert parse_topology("v5e:1x1").options == {"chips_per_host_bounds": (1, 1, 1)}
    assert parse_topology("cpu:8").devices == 8
    assert parse_topology("gpu").devices is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "v4:2x2x1, v5e:4x4"),
        ("v5e:4", "2 sides, as v5e:4x4"),
        ("v5p:2x2", "3 sides, as v5p:2x2x2"),
        ("v5e:0x4", "2 sides"),
        ("v5e:3x2", "even"),
        ("cpu:0", "cpu:8, or gpu"),
    ],
)
def test_topology_that_is_none_is_refused_before_anything_starts(run, text, message):
    code, out, err = run("plan", "--topology", text)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mesh", "data=3"), "has 3 devices, and v5e:2x2 has 4"),
        (("--mesh", "depth=4"), "data, time, height, width"),
        (("--batch", "6"), "6 clips over data=4"),
        (("--frames", "16"), "8k + 1"),
        (("--size", "big"), "288x512"),
        (("--size", "20x256"), "multiple of 8"),
        (("--chunk", "12"), "multiple of 8"),
        (("--search", "--mesh", "data=4"), "give one of the two"),
        (("--search", "--most", "0"), "at least 1"),
    ],
)
def test_request_that_no_program_can_have_is_refused_before_anything_starts(run, words, message):
    code, _, err = run("plan", "--topology", "v5e:2x2", "--batch", "8", *words)
    assert code == 2
    assert message in err


def test_request_takes_from_the_preset_what_is_not_given():
    made = with_mesh(request(size="720x1280", preset="stage2", batch=4), None)
    assert (made.frames, made.height, made.width, made.precision) == (57, 720, 1280, "bfloat16")
    assert (made.mesh, made.model, made.remat) == ({"data": 4}, "pyramid-flow", True)
    assert not request(job="encode").remat


def test_search_tries_clips_on_all_devices_first_and_only_even_divisions():
    tried = list(plan_search.admitted(request()))
    assert tried[0] == {"data": 4}
    assert {"time": 2, "height": 2} in tried
    assert not any(mesh.get("time", 1) > 2 for mesh in tried)  # 16 frames after the first, 8 to a latent
    assert next(plan_search.admitted(request(batch=2))) != {"data": 4}


def test_search_tries_fast_ways_first_and_no_chunks_over_time():
    tried = list(plan_search.candidates(request()))
    assert (tried[0].remat, tried[0].chunk, tried[0].frame_by_frame) == (False, None, False)
    assert any(each.frame_by_frame for each in tried)
    assert any(each.chunk == 8 for each in tried)
    assert any(each.fsdp and each.remat and not each.chunk for each in tried)
    assert not any("time" in each.mesh and (each.chunk or each.frame_by_frame) for each in tried)
    assert not any(each.fsdp and "data" not in each.mesh for each in tried)
    assert len({json.dumps(ahead.asdict(each)) for each in tried}) == len(tried)


def test_search_ranks_what_fits_by_its_bound_and_the_rest_by_what_it_needs():
    reports = [report(40 * GIB, False), report(8 * GIB, True, time=2.0), report(20 * GIB, False), report(9 * GIB, True)]
    ranked = sorted(reports, key=plan_search.rank)
    assert [each.needed for each in ranked] == [9 * GIB, 8 * GIB, 20 * GIB, 40 * GIB]
    assert plan_search.conclusion(ranked).startswith("best: data=4, remat; fits: needs 9 GiB of 16 GiB")


def test_search_in_which_nothing_fits_says_what_would():
    said = plan_search.conclusion([report(24 * GIB, False), report(40 * GIB, False)])
    assert "needs 24 GiB, 1.50 times the 16 GiB" in said
    assert "about 6 devices" in said
    assert "a batch of 5 in place of 8" in said


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G.",
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (24.50G) exceeds available HBM (15.75G).",
    ],
)
def test_refusal_for_want_of_memory_is_read(message):
    assert refused(message) == (int(24.5 * GIB), int(15.75 * GIB))


def test_other_failure_of_the_compiler_is_none_of_memory():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        refused("INTERNAL: something else")


def test_memory_that_a_result_takes_over_from_an_argument_counts_once():
    def taken(donated):
        program = jax.jit(lambda x: x + 1, donate_argnums=donated)
        compiled = program.lower(jax.ShapeDtypeStruct((2**20,), jnp.float32)).compile()
        return measured(report(0, None), compiled, None)

    kept, donated = taken(()), taken((0,))
    assert (donated.memory or {})["aliased"] == 4 * 2**20
    assert kept.needed == pytest.approx(8 * 2**20, rel=0.01)
    assert donated.needed == pytest.approx(4 * 2**20, rel=0.01)


def test_bounds_are_those_of_a_device():
    reduced = Collective("all-reduce", (("f32", (250,)),), 1000, 4, "main")
    work = Program(flops=10**12, bytes=10**9, exchanges=type(Program().exchanges)({reduced: 2}))
    times = seconds(work, CHIPS["v5e"], 4)
    assert times == pytest.approx({"flops": 1e12 / 197e12, "memory": 1e9 / 819e9, "interconnect": 3000 / 200e9})
    half = seconds(work, CHIPS["v7x"], 4)
    assert half["flops"] == pytest.approx(1e12 / (2307e12 / 2))


def test_without_libtpu_the_extra_that_brings_it_is_named(run, monkeypatch):
    monkeypatch.setattr("flax_vae.planning.compile_ahead.find_spec", lambda name: None)
    code, _, err = run("plan", "--topology", "v5e:2x2", "--batch", "4")
    assert code == 2
    assert 'pip install "flax_vae[tpu]"' in err


def test_process_that_dies_shows_what_it_said_last(monkeypatch):
    monkeypatch.setattr(ahead, "WORKER", "flax_vae.planning.no_such_module")
    with pytest.raises(ChildProcessError, match="No module named"):
        ahead.compile_one(with_mesh(request("cpu:2"), None))


def test_encoding_is_measured_on_virtual_devices(run):
    code, out, _ = run("plan", "encode", "--topology", "cpu:2", "--batch", "2", *TINY)
    found = json.loads(out)
    assert code == 0
    assert found["devices"] == 2
    assert found["needed"] > found["memory"]["arguments"] > 4 * 1_000_000  # weights of the encoder, in float32
    assert found["flops"] > 10**8
    assert (found["fits"], found["available"], found["seconds"]) == (None, None, None)


def test_memory_is_that_of_the_order_in_which_commands_run_a_program():
    asked = with_mesh(request("cpu:8", job="decode", preset="tiny", frames=9, size="64"), None)
    assert ahead.compile_one(asked).memory == planned.measure(asked).memory


@pytest.mark.slow
def test_step_of_training_is_measured_on_virtual_devices(run):
    code, out, _ = run("plan", "--topology", "cpu:4", "--batch", "4", "--mesh", "data=2,height=2", *TINY)
    kinds = {entry["kind"] for entry in json.loads(out)["collectives"]}
    assert code == 0
    assert {"all-reduce", "collective-permute"} <= kinds


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_chip_can_be_compiled_for(run, chip):
    count = parse_topology(chip.example).devices
    code, out, _ = run("plan", "encode", "--topology", chip.example, "--batch", count, *TINY)
    found = json.loads(out)
    assert (code, found["fits"], found["devices"]) == (0, True, count)
    assert found["bound"] in ("flops", "memory")


@pytest.mark.slow
@needs_tpu_compiler
def test_two_programs_that_compile_at_once_do_not_disturb_each_other():
    asked = with_mesh(request("v5e:2x2", job="encode", preset="tiny", size="32", frames=9), None)
    reports = [found for _, found in ahead.compiled_ahead([asked, asked]) if isinstance(found, ahead.Report)]
    one, other = (replace(found, compile_seconds=None) for found in reports)
    assert one == other
    assert one.fits


@pytest.mark.slow
@needs_tpu_compiler
def test_program_that_does_not_fit_says_what_it_needs(run):
    words = ("--preset", "tiny", "--frames", "17", "--size", "2048", "--batch", "64")
    code, out, _ = run("plan", "encode", "--topology", "v5e:1x1", *words)
    assert code == 0
    assert "does not fit: needs" in out
    assert "of 15.8 GiB" in out


def test_verdict_says_what_bounds_the_speed():
    assert verdict(report(9 * GIB, True)) == "fits: needs 9 GiB of 16 GiB; at least 1 s, bound by flops"
    assert verdict(report(24 * GIB, False)) == "does not fit: needs 24 GiB of 16 GiB"
