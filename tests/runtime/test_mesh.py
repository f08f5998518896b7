"""Meshes by name and size: what is read, what is refused, and with which advice."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from flax_vae import CausalVideoVAEConfig
from flax_vae.runtime.mesh import AXES, check_sizes, make_mesh, mesh_name, parse_mesh, weights_spec

hypothesis = pytest.importorskip("hypothesis", reason="sizes are drawn by hypothesis")
given, st = hypothesis.given, hypothesis.strategies
TINY = CausalVideoVAEConfig.tiny()


def test_a_mesh_is_read_by_name_and_size():
    assert parse_mesh("data=4,time=2") == {"data": 4, "time": 2}
    assert parse_mesh(" height=2 , data=8") == {"height": 2, "data": 8}
    assert parse_mesh("space=2") == {"height": 2}
    assert parse_mesh(mesh_name({"data": 4, "width": 2})) == {"data": 4, "width": 2}


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=0", "data=-1", "data=2,data=2", "space=2,height=2", "rows=2", "data=2;time=2", "data=.5"],
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=f"mesh {re.escape(repr(text))}: expected each of data, .* as data=4,height=2"):
        parse_mesh(text)


def test_a_mesh_takes_all_devices_there_are():
    devices = jax.devices()[:4]
    mesh = make_mesh({"time": 2, "data": 2}, devices)
    assert dict(mesh.shape) == {"data": 2, "time": 2, "height": 1, "width": 1}
    assert set(mesh.devices.flat) == set(devices)
    with pytest.raises(ValueError, match="data=3 has 3 devices, and there are 4"):
        make_mesh({"data": 3}, devices)
    with pytest.raises(ValueError, match="no axis rows"):
        make_mesh({"rows": 4}, devices)


def test_seventeen_frames_over_eight_are_refused_with_what_would_do():
    with pytest.raises(ValueError) as caught:
        check_sizes({"data": 3, "time": 8}, TINY, 4, 17, 256, 256)
    message = str(caught.value)
    assert "16 frames after the first over time=8: expected clips of 64k + 1 frames, such as 65, or time=2" in message
    assert "height=8 in its place" in message
    assert "4 clips over data=3: expected a multiple of 3, or data=2" in message


@given(
    sizes=st.fixed_dictionaries({axis: st.integers(1, 6) for axis in AXES}),
    counts=st.tuples(*(st.integers(0 if axis == "time" else 1, 12) for axis in AXES)),
)
def test_a_mesh_fits_if_every_device_gets_as_many_whole_latents(sizes, counts):
    batch, latents, rows, columns = counts
    shape = batch, 8 * latents + 1, 8 * rows, 8 * columns
    if all(count % sizes[axis] == 0 for axis, count in zip(AXES, counts, strict=True)):
        check_sizes(sizes, TINY, *shape)
        return
    with pytest.raises(ValueError, match="does not divide the work evenly") as caught:
        check_sizes(sizes, TINY, *shape)
    for axis, size in re.findall(r"or (\w+)=(\d+)", str(caught.value)):  # the advice is sound
        check_sizes({axis: int(size)}, TINY, *shape)
    if found := re.search(r"such as (\d+)", str(caught.value)):
        check_sizes({"time": sizes["time"]}, TINY, batch, int(found[1]), *shape[2:])


def test_images_fit_any_time():
    check_sizes({"time": 8}, TINY, 1, 1, 64, 64)


def test_large_kernels_are_shared_and_nothing_else():
    def spec(name, *shape, devices=4):
        return weights_spec((jax.tree_util.GetAttrKey(name),), np.broadcast_to(np.float32(0), shape), devices)

    assert spec("kernel", 3, 3, 3, 64, 64) == Spec(None, None, None, None, "data")
    assert spec("kernel", 3, 3, 3, 512, 6) == Spec(None, None, None, "data", None)
    assert spec("kernel", 3, 3, 3, 3, 8) == spec("bias", 2**20) == spec("scale", 2**20) == Spec()
    assert spec("kernel", 3, 3, 3, 64, 64, devices=1) == spec("kernel", 3, 3, 3, 65, 65) == Spec()
