"""Schedules of attention over `seq`, as libtpu compiles them."""

import pytest

SETUP = """
import re

import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from blockjax.masks import BlockMask
from blockjax.parallel import Layout, attention, make_mesh
from blockjax.parallel.circulate import Ring
from blockjax.pods.collectives import collectives
from blockjax.pods.program import Program
from blockjax.pods.topology import open_topology

mesh = make_mesh(dict(seq=4), open_topology("v5e:2x2").devices)
def array(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
"""

SCATTER = """
ring = Ring("seq", 4, 1, np.ones((4, 4), bool))
scattered = jax.shard_map(ring.scatter, mesh=mesh, in_specs=P(), out_specs=P(None, "seq"), check_vma=False)
x = array((2, 4096, 4, 128), jnp.float32, P())
for found in collectives(Program(jax.jit(scattered).lower(x).compile().as_text()), mesh):
    print(found.kind, found.sent)
"""

# Of each transfer, how many kernels start while it is under way. What fits into the fast memory is sent while
# results are laid out, without a kernel.
HIDDEN = """
T = 65536
mask, layout = BlockMask.causal(T, bq=512, bk=512), Layout.of("zigzag", T, 4, 512)
def forward(q, k, v):
    return attention(q, k, v, mask, mesh=mesh, schedule="ring", layout=layout)
qkv = [array((1, T, n, 128), jnp.bfloat16, P(None, "seq")) for n in (8, 4, 4)]
def backward(q, k, v, do):
    return jax.vjp(forward, q, k, v)[1](do)
with jax.set_mesh(mesh):
    call, arrays = (backward, [*qkv, qkv[0]]) if BACKWARD else (forward, qkv)
    text = jax.jit(call).lower(*arrays).compile().as_text()
under_way = {}
for line in text.splitlines():
    if start := re.search(r"(\\S+) = .* collective-permute-start\\(", line):
        under_way[start[1]] = 0
    elif done := re.search(r"collective-permute-done\\((\\S+)\\)", line):
        print(under_way.pop(done[1]))
    elif "tpu_custom_call" in line:
        under_way = {name: kernels + 1 for name, kernels in under_way.items()}
"""


def test_gradients_of_gathered_keys_are_scattered_as_such_on_tpus(python):
    done = python("-c", SETUP + SCATTER)
    sent = dict(line.split() for line in done.stdout.splitlines())
    # libtpu rounds rows up, and a permutation of less than a hundredth of the bytes puts them straight.
    assert {"reduce-scatter"} <= sent.keys() <= {"reduce-scatter", "collective-permute"}, done.stderr[-2000:]
    assert sum(map(float, sent.values())) == pytest.approx(2 * 4096 * 4 * 128 * 4 * 3 / 4, rel=0.02)


# The backward takes minutes to compile, the forward one.
@pytest.mark.exhaustive
@pytest.mark.parametrize("backward", [False, True])
def test_transfers_hide_behind_kernels(python, backward):
    done = python("-c", f"BACKWARD = {backward}\n{SETUP}{HIDDEN}")
    kernels = [int(n) for n in done.stdout.split()]
    # Keys and values make three hops, and so do their gradients; the backward may keep what came before.
    assert len(kernels) >= (12 if backward else 6), done.stdout + done.stderr[-2000:]
    assert min(kernels) >= 1, done.stdout
