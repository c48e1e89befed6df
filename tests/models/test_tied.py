"""Layers that are applied several times: against the same layers copied, and what tells them the time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.models import Transformer, logical_axes
from blockjax.models.tied import Condition
from blockjax.parallel.mesh import partition_spec
from tests.models.tiny import random_model, tiny_config

pytestmark = pytest.mark.usefixtures("dense_attention")

T, VOCAB = 24, 24
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, T)), jnp.int32)
# Options, and which layer with weights of its own each one is.
CASES = {
    "scan": (dict(depth=5, loop="1,2*2"), [0, 1, 2, 1, 2]),
    "periods": (dict(depth=4, loop="2*2", pattern="8,lightning", remat="dots"), [0, 1, 0, 1]),
    # Layers of the loop lie in two periods, and so run on their own.
    "askew": (dict(depth=5, loop="1,2*2", pattern="8,full", remat="full"), [0, 1, 2, 1, 2]),
    # Each time has windows of its own.
    "locality": (dict(depth=4, loop="2*2", locality="beta:1,smallest=4", context=64), [0, 1, 0, 1]),
    "bucket": (
        dict(depth=4, loop="2*2", locality="table:0/0/1/1,smallest=4", context=64, stack="bucket"),
        [0, 1, 0, 1],
    ),
    "unroll": (dict(depth=3, loop="1,1*2", stack="unroll"), [0, 1, 1]),
}
EXTRA = {"unroll", "locality", "askew", "bucket"}


def make(**options) -> Transformer:
    return random_model(tiny_config(**dict(attention_block=16) | options))


def params_of(model) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def loss_of(model):
    graph = nnx.graphdef(model)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, VOCAB)), jnp.float32)

    def loss(params):
        logits = nnx.merge(graph, params)(TOKENS)
        return jnp.sum(weights * logits), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=(pytest.mark.exhaustive,) * (case in EXTRA)) for case in CASES]
)
@pytest.mark.sample("scan")
def test_tied_layers_are_copies_and_their_gradient_is_the_sum(case):
    options, owners = CASES[case]
    tied = make(**options, condition=0)
    untied = make(**options | dict(loop="", stack="scan", remat="none"))
    assert list(tied.config.owners) == owners and tied.config.layers() == untied.config.layers()
    ours = params_of(tied)
    own = [params_of(block) for block in tied.distinct()]
    copied = params_of(untied)
    period = len(untied.config.period)
    for i in range(period):
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        layers = [own[w] for w in owners[i : len(owners) // period * period : period]]
        copied["periods"][f"slot_{i}"] = jax.tree.map(stack, *layers)
    copied["tail"] = {f"slot_{i}": own[w] for i, w in enumerate(owners[len(owners) // period * period :])}

    (_, logits), found = loss_of(tied)(ours)
    (_, expected), grads = loss_of(untied)(copied)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits).max() > 0.1
    summed = [None] * len(own)
    for w, block in zip(owners, nnx.merge(nnx.graphdef(untied), grads).distinct(), strict=True):
        mine = params_of(block)
        summed[w] = mine if summed[w] is None else jax.tree.map(jnp.add, summed[w], mine)
    others = lambda tree: {k: x for k, x in tree.items() if k not in ("periods", "tail")}  # noqa: E731
    blocks = [params_of(block) for block in nnx.merge(nnx.graphdef(tied), found).distinct()]
    close((others(found), blocks), (others(grads), summed))


def close(found, expected):
    """Gradients that are not zero."""
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(e).max()
        assert scale > 1e-4, path
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4 * scale, err_msg=str(path))


def reference(params, config, spans, attend):
    """Logits with each layer told the time, from plain formulas; `spans` are (layer, time) in order."""
    norm = lambda x, gain: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain  # noqa: E731
    silu = lambda x: x / (1 + jnp.exp(-x))  # noqa: E731
    c, x = params["condition"], params["embedding"][TOKENS] * config.width**0.5
    for layer, time in spans:
        p = jax.tree.map(lambda a: a[layer], params["periods"]["slot_0"])  # noqa: B023
        t1, t2, t3 = 1.0, 1.0, 1.0
        if time is not None:
            h = silu(time * c["inner"][layer - 1] + c["inner_bias"][layer - 1])
            t1, t2, t3 = jnp.split(1 + h @ c["outer"][layer - 1] + c["outer_bias"][layer - 1], 3)
        y = x + t1 * attend(layer, norm(x, p["attention_norm"]["gain"]))
        h, m = norm(y, p["mlp_norm"]["gain"]), p["mlp"]
        x = t3 * (y + t2 * ((silu(h @ m["gate"]) * (h @ m["up"])) @ m["down"]))
    return norm(x, params["final_norm"]["gain"]) @ params["head"]


@pytest.mark.exhaustive
def test_gains_are_those_of_the_formula():
    """t1 and t2 on what sublayers add, t3 on the stream; one time after the other, from 0."""
    model = make(depth=3, loop="1,1*2", condition=5)
    params, rope = params_of(model), model.rope(jnp.broadcast_to(jnp.arange(T), TOKENS.shape))
    see = model.attend(model.config.layers()[0], None)
    merge = lambda params: nnx.merge(nnx.graphdef(model), params)  # noqa: E731

    def plain(params):
        blocks = list(merge(params).distinct())
        attend = lambda layer, x: blocks[layer].attention(x, rope, see)  # noqa: E731
        times = [(0, None), (1, 0.0), (1, 1.0)]
        return reference(params, model.config, times, attend)

    def one_at_a_time(params):
        model = merge(params)
        layers = list(model.layers())
        return model.logits(model.run_layers(model.embed(TOKENS), rope, layers, [see] * 3)[0])

    def gradient(f):
        def loss(params):
            logits = f(params)
            return jnp.sum(jnp.sin(logits)), logits

        (_, logits), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return logits, found

    (logits, found), (expected, grads) = gradient(lambda params: merge(params)(TOKENS)), gradient(plain)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(one_at_a_time)(params), expected, rtol=1e-4, atol=1e-4)
    close(found, grads)


def test_applied_once_it_is_the_model_without_a_loop():
    """Bit for bit where layers are not told which time it is, and next to it where they are, at the start."""
    run = jax.jit(lambda model: model(TOKENS))
    plain, silent, told = (
        run(make(depth=3, **options)) for options in ({}, dict(loop="1,2*1", condition=0), dict(loop="1,2*1"))
    )
    np.testing.assert_array_equal(silent, plain)
    assert np.abs(told - plain).max() > 0.1
    model = make(depth=3, loop="1,2*1")
    model.condition = Condition(2, 16, 16, rngs=nnx.Rngs(0))
    difference = np.abs(run(model) - plain).max()
    assert 1e-7 < difference < 1e-3 * np.abs(plain).max()


def test_repeats_change_at_call_time():
    """The same parameters in the model whose config says another number."""
    run = jax.jit(lambda model: model(TOKENS))
    model = make(depth=4, loop="1,1*2,1")
    other = model.with_repeats(5)
    assert (other.config.loop, other.config.depth, model.config.loop) == ("1,1*5,1", 7, "1,1*2,1")
    found = run(other)
    np.testing.assert_array_equal(found, run(make(depth=7, loop="1,1*5,1")))
    for a, b in zip(jax.tree.leaves(params_of(other)), jax.tree.leaves(params_of(model)), strict=True):
        assert a is b
    assert np.abs(found - run(model)).max() > 0.1
    with pytest.raises(UsageError, match=r"0 times.*at least 1"):
        model.with_repeats(0)
    with pytest.raises(UsageError, match=r"3 times.*with a \*.*''"):
        make(depth=2).with_repeats(3)


def test_each_time_has_a_memory_of_its_own():
    """A sequence in two parts is the whole, and memories are not shared between times."""
    # A window of 1 is all that attention sees in a part as in the whole.
    model = make(depth=6, loop="2*2,2", pattern="lightning,1")
    graph, params = nnx.split(model)
    memory = model.memory(2)
    assert sorted(memory) == ["layer_0", "layer_2", "layer_4"]
    advance = jax.jit(lambda params, tokens, memory: nnx.merge(graph, params).advance(tokens, memory))
    whole, _ = advance(params, TOKENS, memory)
    half = T // 2  # of equal length: one program
    first, middle = advance(params, TOKENS[:, :half], memory)
    second, after = advance(params, TOKENS[:, half:], middle)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-3, atol=1e-3)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, memory)
    states = [np.asarray(jax.tree.leaves(middle[f"layer_{i}"])[0]) for i in (0, 2)]
    assert np.abs(states[0] - states[1]).max() > 1e-3
    swapped = middle | dict(layer_0=middle["layer_2"], layer_2=middle["layer_0"])
    assert np.abs(advance(params, TOKENS[:, half:], swapped)[0] - second).max() > 1e-3


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("condition", [0, 5])
@pytest.mark.parametrize("pattern", ["full", "gdn,8"])
def test_parameters_are_there_once(condition, pattern):
    config = tiny_config(depth=9, loop="1,2*3,2", condition=condition, pattern=pattern)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert config.num_params() == count(model)
    plain = tiny_config(depth=5, pattern=pattern).num_params()
    assert config.num_params() == plain + 2 * (2 * condition + 48 * (condition + 1)) * bool(condition)
    assert config.distinct == 5 and len(config.layers()) == 9
    if pattern == "full":  # what a token meets: nine layers, and in six of them three gains
        untied = tiny_config(depth=9).num_params()
        assert config.num_params(applied=True) == untied + 18 * 16 * bool(condition)


def test_every_dimension_is_named():
    config = tiny_config(depth=6, loop="1,2*2,1")
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    shapes, names = nnx.to_pure_dict(nnx.state(model, nnx.Param)), logical_axes(model)
    jax.tree.map(lambda leaf, axes: partition_spec(axes) and None, shapes, names)
    assert jax.tree.all(jax.tree.map(lambda leaf, axes: leaf.ndim == len(axes), shapes, names))


def test_the_program_and_what_it_keeps_do_not_grow_with_copies_of_weights():
    def program(repeats):
        model = make(depth=2 + 2 * repeats, loop=f"1,2*{repeats},1", dtype="bfloat16", ffn=56)
        graph, params = nnx.split(model)
        loss = lambda params: jnp.sum(nnx.merge(graph, params)(TOKENS) ** 2)  # noqa: E731
        kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
        return str(jax.make_jaxpr(jax.grad(loss))(params)), shapes

    (few, _), (many, kept) = program(3), program(7)
    assert abs(many.count("\n") - few.count("\n")) <= 2
    weights = {(2, 16, 56), (2, 56, 16), (2, 16, 4, 8), (2, 16, 2, 8), (2, 4, 8, 16)}
    assert (7, 2, 2, T, 56) in kept  # activations of each time
    assert not [shape for shape in kept if shape[:1] == (7,) and shape[1:] in weights]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(depth=8, loop="1,2*3"), ["'1,2*3'", "7 layers", "depth=8"]),
        (dict(depth=4, loop="2*x,2"), ["'2*x'", "'2,4*3,2'"]),
        (dict(depth=4, loop="0*2,4"), ["'0*2'"]),
        (dict(depth=4, loop="4,"), ["''"]),
        (
            dict(depth=6, loop="1,2*2,1", residual="block_attn_res:size=4"),
            ["loop", "prenorm", "block_attn_res"],
        ),
        (dict(depth=2, condition=-1), ["condition=-1"]),
    ],
)
def test_bad_loops_are_refused(options, words):
    with pytest.raises(UsageError) as error:
        tiny_config(**options)
    assert all(word in str(error.value) for word in words)


def test_the_looped_model_looks_at_every_time():
    """Probes of all times in order, and pairs that are visible each time."""
    model = make(depth=6, loop="1,2*2,1", pattern="4,8")
    look = jax.jit(lambda model: model.inspect(TOKENS, probe=lambda q, k, spec, ids: jnp.mean(q)).probes)
    found, expected = look(model), look(make(depth=6, loop="1,2*2,1", pattern="4,8", stack="unroll"))
    assert found.shape == (6,) and len(set(np.round(np.asarray(found), 6))) == 6
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    positions = jnp.broadcast_to(jnp.arange(T), TOKENS.shape)
    windows = [4, 8, 4, 8, 4, 8]
    pairs = sum(min(w, t + 1) for w in windows for t in range(T)) * 2
    assert float(model.visible_pairs(TOKENS, positions)) == pairs and math.isfinite(pairs)
