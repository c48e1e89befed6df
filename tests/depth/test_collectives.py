"""What devices say to each other for a mix: nothing where tokens are cut, two sums a source where M is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.depth_mix import depth_read, sharded_depth_read
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blockjax.depth import DepthQueries, Residual, Stream
from blockjax.models.transformer import RMSNorm
from blockjax.parallel import make_mesh
from tests.hlo import collectives

B, T, M, SUBLAYERS = 2, 8, 24, 5


def layers(residual, params, x):
    """All rules of the stream around sublayers that keep to their token."""
    residual = Residual.parse(residual, SUBLAYERS)
    depth, norm = DepthQueries(residual, M), RMSNorm(M, 1e-6)
    depth.query[...], norm.gain[...] = params["query"][: residual.readers], params["gain"]
    if depth.gate is not None:
        depth.gate[...] = params["query"][: residual.readers, 0]
    stream = Stream(residual, depth, x, eps=1e-6)
    for s in range(SUBLAYERS):
        row = stream.row(s)
        partial, h, _ = stream.join(stream.partial, row, norm, residual.starts(s))
        stream.write(partial, jnp.tanh(h))
    return stream.output(norm)


def arrays():
    rng = np.random.default_rng(0)
    params = dict(query=rng.normal(size=(SUBLAYERS + 1, M)), gain=rng.uniform(0.5, 1.5, M))
    return jax.tree.map(np.float32, params), rng.normal(size=(B, T, M)).astype(np.float32)


def compiled(function, mesh, *args, specs):
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        program = jax.jit(function).lower(*args).compile()
        return program.as_text(), jax.tree.map(np.asarray, program(*args))


@pytest.mark.parametrize("residual", ["block_attn_res:size=3,heads=2", "delta_block:size=2"])
@pytest.mark.sample("delta_block*")
def test_cut_sequences_mix_in_silence(residual):
    params, x = arrays()

    def loss(params, x):
        y = layers(residual, params, x)
        return jnp.sum(y * jnp.sin(y)), y

    forward, gradients = lambda *args: loss(*args)[1], jax.grad(lambda *args: loss(*args)[0], (0, 1))
    mesh, specs = make_mesh(dict(data=2, seq=4)), (P(), P("data", "seq"))
    text, y = compiled(forward, mesh, params, x, specs=specs)
    assert not collectives(text)
    # Bit for bit what a device finds that knows of no other.
    alone = jax.jit(forward)
    for b in range(B):
        for t in range(0, T, T // 4):
            here = np.s_[b : b + 1, t : t + T // 4]
            np.testing.assert_array_equal(y[here], alone(params, x[here]))

    # The one thing that all tokens share is the parameters: their gradients meet, and nothing else.
    text, found_gradients = compiled(gradients, mesh, params, x, specs=specs)
    found = collectives(text)
    assert found and all(op == "all-reduce" for op, *_ in found)
    assert all(math.prod(shape) <= params["query"].size for _, shapes, _ in found for shape in shapes)
    expected = jax.jit(gradients)(params, x)
    for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("R", "heads", "sums"), [(1, 1, 2), (3, 1, 4), (3, 8, 1)])
def test_of_a_cut_width_two_sums_travel(R, heads, sums):
    """For each source and token its sum of squares, and its products with queries unless heads are whole."""
    rng = np.random.default_rng(0)
    sources = [rng.normal(size=(B, T, M)).astype(np.float32) for _ in range(3)]
    queries = rng.normal(size=(R, M)).astype(np.float32)

    def read(queries, *sources):
        return sharded_depth_read(sources, queries, heads=heads, width="tensor")[:2]

    def gradients(queries, *sources):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(read(*args)[0])), (0, 1, 2, 3))(queries, *sources)

    mesh = make_mesh(dict(tensor=4, data=2))
    specs = P(None, "tensor"), *(P("data", None, "tensor"),) * 3
    text, (o, lse) = compiled(read, mesh, queries, *sources, specs=specs)
    assert sizes(text) == sums * len(sources) * B * T // 2
    expected = depth_read(sources, queries, heads=heads)
    np.testing.assert_allclose(o, expected.o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-5, atol=1e-5)

    # Backward the products of cotangents and sources, or their sum over heads, and gradients of queries.
    text, _ = compiled(gradients, mesh, queries, *sources, specs=specs)
    products = R if heads == 1 else 1
    queries = len(sources) * R * M // 4
    assert sizes(text) <= (sums + products) * len(sources) * B * T // 2 + queries


def sizes(text):
    """How many numbers all collectives of a program sum; it has no others."""
    found = collectives(text)
    assert {op for op, *_ in found} == {"all-reduce"}
    return sum(math.prod(shape) for _, shapes, _ in found for shape in shapes)
