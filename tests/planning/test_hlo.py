"""What is read from the text of a compiled program, against closed forms."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from flax_vae.planning.hlo import Collective, program
from flax_vae.planning.hlo_text import parse, stored
from tests.compiled import text

MATRIX = 2 * 64 * 32 * 32  # flops of x @ w


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def times(x, w, length):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=length)[0]


def conv(x, kernel, stride=1, padding=((2, 0), (1, 1), (1, 1)), groups=1):
    names = "NDHWC", "DHWIO", "NDHWC"
    return jax.lax.conv_general_dilated(
        x, kernel, (1, stride, stride), padding, dimension_numbers=names, feature_group_count=groups
    )


def test_loop_counts_as_often_as_it_runs():
    hlo = text(compiled(lambda x, w: times(x, w, 7), (64, 32), (32, 32)))
    assert program(hlo).flops == 7 * MATRIX


def test_loop_whose_turns_are_not_told_counts_once_and_says_so():
    hlo = text(compiled(lambda x, w: times(x, w, 7), (64, 32), (32, 32)))
    unknown = re.sub(r'"known_trip_count":\{"n":"7"\},?', "", hlo)
    assert program(unknown).flops == 7 * MATRIX  # from the number in the condition
    unknown = re.sub(r"constant\(7\)", "parameter(1)", unknown)
    assert (program(unknown).flops, program(unknown).endless) == (MATRIX, 1)


def test_loops_in_loops_multiply():
    def nested(x, ws):
        return jax.lax.scan(lambda x, w: (times(x, w, 3), None), x, ws)[0]

    hlo = text(compiled(nested, (64, 32), (5, 32, 32)))
    assert program(hlo).flops == 15 * MATRIX


def test_loop_reads_of_a_stack_only_the_slice_of_each_turn():
    def sums(x, stack):
        return jax.lax.scan(lambda x, row: (jnp.tanh(x + row), None), x, stack)[0]

    hlo = text(compiled(sums, (1000,), (50, 1000)))
    stack = 50 * 1000 * 4
    assert stack < program(hlo).bytes < 8 * stack  # with the whole stack each turn, it would be 50 times


@pytest.mark.parametrize("padded", [False, True])
def test_convolution_counts_products_with_real_inputs_alone(padded):
    padding = ((2, 0), (1, 1), (1, 1)) if padded else ((0, 0), (0, 0), (0, 0))
    hlo = text(compiled(lambda x, k: conv(x, k, padding=padding), (1, 5, 16, 16, 8), (3, 3, 3, 8, 16)))
    pairs = (3 * 5 - 3) * (3 * 16 - 2) ** 2 if padded else (3 * 3) * (3 * 14) ** 2
    assert program(hlo).flops == 2 * 8 * 16 * pairs


def test_convolution_in_groups_has_fewer_products():
    hlo = text(compiled(lambda x, k: conv(x, k, groups=4), (1, 5, 16, 16, 8), (3, 3, 3, 2, 16)))
    assert program(hlo).flops == 2 * 2 * 16 * (3 * 5 - 3) * (3 * 16 - 2) ** 2


def test_gradient_by_inputs_and_kernel_takes_twice_the_products_of_a_strided_convolution():
    def loss(x, kernel):
        return (conv(x, kernel, stride=2) * jnp.float32(2)).sum()

    shapes = (2, 5, 16, 16, 8), (3, 3, 3, 8, 16)
    gradient = compiled(jax.grad(lambda x, k: (conv(x, k, 2) ** 2).sum(), (0, 1)), *shapes)
    forward = program(text(compiled(loss, *shapes))).flops
    assert program(text(gradient)).flops == pytest.approx(3 * forward)


def test_program_without_loops_moves_the_bytes_that_xla_counts():
    built = compiled(conv, (1, 5, 16, 16, 8), (3, 3, 3, 8, 16))
    assert program(text(built)).bytes == (built.cost_analysis() or {})["bytes accessed"]


EXCHANGES = """
HloModule by_hand

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%turn (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%state), index=1
  %permute = (bf16[8,128], bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %permuted = bf16[8,128]{1,0} collective-permute-done(%permute)
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%i, %permuted)
}

%more (state.1: (s32[], bf16[8,128])) -> pred[] {
  %state.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[8,128], w: f32[4]) -> (bf16[32,128], f32[4]) {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %w = f32[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[8,128]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[], /*index=1*/bf16[8,128]{1,0}) while(%first), condition=%more, body=%turn
  %y = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  %gather = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %gathered = bf16[32,128]{1,0} all-gather-done(%gather)
  %reduced = f32[4]{0} all-reduce(%w), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %all = (bf16[32,128]{1,0}, f32[4]{0}) tuple(%gathered, %reduced)
}
"""


def test_collectives_have_their_shapes_and_groups_and_count_as_often_as_a_loop_runs_them():
    assert program(EXCHANGES).exchanges == {
        Collective("collective-permute", (("bf16", (8, 128)),), 2048, 0, "turn"): 5,
        Collective("all-gather", (("bf16", (32, 128)),), 8192, 4, "main"): 1,
        Collective("all-reduce", (("f32", (4,)),), 16, 2, "main"): 1,
    }


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((8,), ("rows",))
def conv(x, k):
    names = "NHWC", "HWIO", "NHWC"
    return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=names).sum()
def shape(spec, *sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
print(jax.jit(conv).lower(shape((None, "rows"), 2, 64, 32, 8), shape((), 3, 3, 8, 8)).compile().as_text())
"""


def test_sharded_convolution_has_a_halo_of_one_row_on_both_sides_and_one_all_reduce():
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=True)
    found = program(run.stdout).exchanges
    assert sorted((each.kind, count) for each, count in found.items()) == [("all-reduce", 1), ("collective-permute", 2)]
    assert {each.arrays for each in found} == {(("f32", (2, 1, 32, 8)),), (("f32", ()),)}


@pytest.mark.parametrize(
    ("shape", "size", "is_near"),
    [
        ("f32[3,5]{1,0}", 60, False),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4, False),
        ("bf16[7,16,3]{1,2,0:T(4,128)(2,1)S(1)}", 7 * 4 * 128 * 2, True),
        ("pred[9]{0}", 9, False),
        ("s4[10]{0}", 5, False),
        ("f8e4m3fn[]", 1, False),
    ],
)
def test_array_takes_the_bytes_of_its_tiles(shape, size, is_near):
    (array,) = stored(shape)
    assert (array.bytes, array.is_near) == (size, is_near)


def test_text_of_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("module @jit_f {}")
