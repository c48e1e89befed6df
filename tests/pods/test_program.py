"""Reading compiled programs: ones whose collectives are known, and lines as libtpu prints them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.parallel import make_mesh
from blockjax.pods.collectives import _group, collectives
from blockjax.pods.program import Program, arrays

TURNS = 5


def compiled(body, mesh, spec, out=None, shape=(8, 16)):
    call = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=out or spec, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(call).lower(x).compile().as_text()


def in_a_loop(step):
    return lambda x: jax.lax.fori_loop(0, TURNS, lambda i, x: step(x) * (1.0 + i), x)


ROTATE = functools.partial(jax.lax.ppermute, axis_name="data", perm=[(i, (i + 1) % 4) for i in range(4)])
# What a device does with its [2, 8] float32, 64 bytes; and bytes that it sends for it.
BODIES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), ("data",), 4, 2 * 64 * 3 / 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "tensor").sum(0), ("tensor",), 2, 64),
    "reduce-scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "tensor", tiled=True), (2, 1)),
        ("tensor",),
        2,
        64 / 2,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, ("data", "tensor"), 1, 1, tiled=True),
        ("data", "tensor"),
        8,
        64 * 7 / 8,
    ),
    "collective-permute": (ROTATE, ("data",), 2, 64),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("looped", [False, True], ids=["once", "in a loop"])
def test_known_collectives(kind, looped):
    step, axes, size, sent = BODIES[kind]
    mesh = make_mesh(dict(data=4, tensor=2))
    text = compiled(in_a_loop(step) if looped else step, mesh, P("data", "tensor"))
    program = Program(text)
    (found,) = collectives(program, mesh)
    turns = TURNS if looped else 1
    assert (found.kind, found.axes, found.size, found.count) == (kind, axes, size, turns)
    assert found.sent == pytest.approx(turns * sent)
    assert program.uncounted == 0


def test_loops_in_loops_multiply():
    mesh = make_mesh(dict(data=8))
    step = in_a_loop(in_a_loop(lambda x: jax.lax.psum(x, "data")))
    (found,) = collectives(Program(compiled(step, mesh, P("data"))), mesh)
    assert found.count == TURNS**2


def test_a_loop_of_unknown_length_is_reported():
    mesh = make_mesh(dict(data=8))

    def until_large(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jax.lax.psum(x, "data") + 1, x)

    program = Program(compiled(until_large, mesh, P("data")))
    assert program.uncounted == 1
    assert [found.count for found in collectives(program, mesh)] == [1]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, use_global", [0, 2]),
        ("replica_groups=[2,4]<=[8], use", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, dimensions={0}", [0, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, dimensions={0}", [*range(8)]),
        ("replica_groups=mesh['fsdp'=8] {'fsdp':(1)2}, dimensions={0}", [0, 4]),
        ("replica_groups=mesh['fsdp'=8] {'fsdp':(2)4}, dimensions={0}", [0, 1, 2, 3]),
        ("source_target_pairs={{0,0},{1,2},{2,1}}, channel", [1, 2]),
        ("source_target_pairs={{0,0}}, channel", []),
        ("replica_groups={}, use_global", [*range(8)]),
    ],
)
def test_every_way_in_which_groups_are_printed(text, group):
    assert _group(text, 8) == group


def test_sizes_of_shapes():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, pred[5]{0}, s4[8]{0}, /*index=4*/u32[2]{0})"
    assert [size for size, _ in arrays(shape)] == [12, 4, 5, 4, 8]


# As libtpu prints a scan over four layers: slices of what is stacked, a loop whose condition alone knows its
# length, an all-reduce and a slice in a fusion, and an array in the fast memory.
SCAN = """\
HloModule step, is_scheduled=true

%fused (param_0: f32[4,256,128], param_1: s32[]) -> f32[1,256,128] {
  %param_0 = f32[4,256,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,256,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero, %zero)
}

%all-reduce-scatter.1 (input: f32[256,128]) -> f32[64,128] {
  %input = f32[256,128]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[256,128]{1,0:T(8,128)} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[64,128]{1,0:T(8,128)} slice(%all-reduce.1), slice={[0:64], [0:128]}
}

%body (arg: (s32[], f32[4,256,128])) -> (s32[], f32[4,256,128]) {
  %arg = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = f32[4,256,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
  %layer = f32[1,256,128]{2,1,0:T(8,128)S(1)} fusion(%stack, %turn), kind=kLoop, calls=%fused
  %flat = f32[256,128]{1,0:T(8,128)S(1)} bitcast(%layer)
  %own = f32[64,128]{1,0:T(8,128)S(1)} fusion(%flat), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %result = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}) tuple(%turn, %stack)
}

%condition (arg: (s32[], f32[4,256,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %arg.1 = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn.1, %limit), direction=LT
}

ENTRY %main (stack.1: f32[4,256,128]) -> f32[4,256,128] {
  %stack.1 = f32[4,256,128]{2,1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}) tuple(%start, %stack.1)
  %while = (s32[]{:T(128)}, f32[4,256,128]{2,1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  ROOT %out = f32[4,256,128]{2,1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def test_a_scan_as_libtpu_prints_it():
    program, mesh = Program(SCAN), make_mesh(dict(data=2, fsdp=4))
    assert program.runs["body"] == program.runs["all-reduce-scatter.1"] == 4
    (found,) = collectives(program, mesh)
    assert (found.kind, found.axes, found.size, found.count) == ("reduce-scatter", ("fsdp",), 4, 4)
    assert found.sent == 4 * 256 * 128 * 4 * 3 / 4
    # Each turn reads its own layer and the counter; all else stays in fast memory.
    assert program.hbm_bytes() == 4 * (256 * 128 * 4 + 4)


def test_traffic_of_a_product_and_an_update():
    def body(stack, x):
        return jax.lax.fori_loop(
            0, 8, lambda i, s: jax.lax.dynamic_update_slice(s, x[None], (i, 0, 0)), stack
        )

    stack, x = jnp.zeros((8, 64, 64)), jnp.ones((64, 64))
    program = Program(jax.jit(body, donate_argnums=0).lower(stack, x).compile().as_text())
    moved, layer = program.hbm_bytes(), np.prod(x.shape) * 4
    # Each turn writes one layer, and may read it, but never the stack.
    assert 8 * 2 * layer <= moved < 8 * 4 * layer
