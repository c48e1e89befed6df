"""The Block-Recurrent layer against a loop over blocks, with documents, memories and single tokens."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blockjax.errors import UsageError
from blockjax.parameters import apply_rope, rope_table
from blockjax.recurrence import BlockRecurrent, Past, forget
from tests.models.tiny import tiny_config

W, S, T, B = 4, 3, 14, 2
CONFIG = tiny_config(attention_block=4)
CELLS = {"fixed": "skip", "lstm": "dual", "lstm_single": "single"}
# Two documents, the second of which starts within a block, and padding; one document.
IDS = jnp.array([[5] * 6 + [6] * 5 + [-1] * 3, [0] * T])


def make(gate="fixed", cell="skip", **values):
    """`(graph, params)`, filled with NumPy; `values` replace parameters."""
    mixer = BlockRecurrent(W, S, gate, cell)
    graph, state = nnx.split(nnx.eval_shape(lambda: mixer.build(CONFIG, rngs=nnx.Rngs(0))))

    def fill(path, leaf):
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        if path[-1].key in values:
            return jnp.asarray(values[path[-1].key](rng.normal(size=leaf.shape)), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.5 if leaf.ndim > 1 else 1), leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))


def inputs(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, CONFIG.width)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 5))
def run(graph, params, x, ids=None, memory=None, keep=True):
    return nnx.merge(graph, params)(x, Past(memory, ids, keep))


def norm(x, gain):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain


def unit(x):
    return x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6)


def attend(q, k, v, visible):
    """Dense attention of q [T, N, H] over k, v [S, K, H]; rows that see nothing give 0."""
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    z = jnp.where(visible, jnp.einsum("tnh,snh->nts", q, k), -jnp.inf)
    p = jnp.where(visible, jnp.exp(z - jnp.max(jnp.where(visible, z, -1e9), -1, keepdims=True)), 0.0)
    p = p / jnp.maximum(jnp.sum(p, -1, keepdims=True), 1e-30)
    return jnp.einsum("nts,snh->tnh", p, v)


def gate(p, s, z, y):
    if "forget" not in p:
        g = jax.nn.sigmoid(p["forget_bias"])
        return g * s + (1 - g) * z
    y = y.reshape(len(s), -1)
    f, i = (y @ p[name].reshape(-1, s.shape[1]) + p[f"{name}_bias"] for name in ("forget", "input"))
    return jax.nn.sigmoid(f + 1) * s + jax.nn.sigmoid(i - 1) * z


def loop(p, x, ids, cell):
    """The layer, a row and a block at a time."""
    ids, out = np.asarray(ids), []
    project = lambda x, w: jnp.einsum("tm,mnh->tnh", x, w)  # noqa: E731
    scale = lambda q, a: q * jnp.abs(a)[:, None]  # noqa: E731

    def read(s):
        n = norm(s, p["norm"]["gain"]) + p["ids"]
        q, qt, k = (unit(project(n, p[f"state_{name}"])) for name in ("q", "q_tokens", "k"))
        return scale(q, p["state_scale"]), scale(qt, p["state_scale_tokens"]), k, project(n, p["state_v"])

    for row, doc in zip(x, ids, strict=True):
        q, qs, k = (unit(project(row, p[name])) for name in ("q", "q_states", "k"))
        q, qs, v = scale(q, p["scale"]), scale(qs, p["scale_states"]), project(row, p["v"])
        turn = lambda a: apply_rope(a[None], rope_table(jnp.arange(T)[None], 8, 10_000.0))[0]  # noqa: E731
        states, owner, of_states = p["start"], doc[0], []
        for begin in range(0, T, W):
            block = slice(begin, min(begin + W, T))
            here = doc[block]
            reads = read(states), read(p["start"])
            own, fresh = (attend(qs[block], r[2], r[3], np.full((len(here), S), True)) for r in reads)
            of_states.append(jnp.where((here == owner)[:, None, None], own, fresh))
            last = here[here >= 0][-1] if (here >= 0).any() else owner
            if last != owner:
                states, owner = p["start"], last
            s_q, s_qt, s_k, s_v = read(states)
            two = slice(max(0, begin - W), block.stop)
            y = jnp.concatenate(
                [
                    attend(s_q, s_k, s_v, np.full((S, S), True)),
                    attend(
                        s_qt, k[two], v[two], np.broadcast_to(doc[two] == last, (S, two.stop - two.start))
                    ),
                ],
                axis=1,
            )
            if cell == "single":
                inner = jax.nn.relu(jnp.einsum("snh,nhf->sf", y, p["mlp"]["up"]))
                states = gate(p["gate"], states, jnp.tanh(inner @ p["mlp"]["down"]), inner)
                continue
            states = gate(p["gate"], states, jnp.einsum("snh,nhm->sm", y, p["state_o"]), y)
            if cell == "dual":
                inner = jax.nn.relu(norm(states, p["mlp_norm"]["gain"]) @ p["mlp"]["up"])
                states = gate(p["mlp_gate"], states, inner @ p["mlp"]["down"], inner)
        distance = np.arange(T)[:, None] - np.arange(T)
        visible = (distance >= 0) & (distance < W) & (doc[:, None] == doc) & (doc >= 0)
        read_all = jnp.concatenate([attend(turn(q), turn(k), v, visible), jnp.concatenate(of_states)], axis=1)
        out.append(jnp.einsum("tnh,nhm->tm", read_all, p["o"]))
    return jnp.stack(out)


@pytest.mark.parametrize(("gate", "cell"), [("fixed", "skip"), ("lstm", "dual"), ("lstm", "single")])
@pytest.mark.sample("lstm-dual")
def test_outputs_and_gradients_of_a_loop_over_blocks(gate, cell):
    graph, params = make(gate, cell)
    real = (IDS >= 0)[..., None]
    weights = jnp.where(real, jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 16)), jnp.float32), 0)

    def ours(params, x):
        y, _ = nnx.merge(graph, params)(x, Past(None, IDS))
        return jnp.sum(weights * y), jnp.where(real, y, 0)

    def naive(params, x):
        y = loop(params, x, IDS, cell)
        return jnp.sum(weights * y), jnp.where(real, y, 0)

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, inputs()) for f in (ours, naive)
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], rtol=2e-4, atol=2e-5)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        assert np.abs(e).max() > 1e-4, path
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4 * np.abs(e).max(), err_msg=str(path))


@pytest.fixture(scope="module")
def lstm():
    return make("lstm", "dual")


def test_without_what_states_give_it_is_a_window():
    graph, params = make(o=lambda x: np.concatenate([x[: len(x) // 2], 0 * x[len(x) // 2 :]]))
    x = inputs()
    before = run(graph, params, x, IDS)[0]
    other = params | {"start": params["start"] + 1, "state_v": -params["state_v"]}
    np.testing.assert_array_equal(before, run(graph, other, x, IDS)[0])
    moved = np.abs(run(graph, params, x.at[:, 5].add(1.0))[0] - run(graph, params, x)[0]).max(-1)
    np.testing.assert_array_equal(np.flatnonzero(moved[1] > 1e-6), range(5, 5 + W))


def test_a_block_reads_states_from_before_it_and_every_later_block_from_it():
    graph, params = make(o=lambda x: np.concatenate([0 * x[: len(x) // 2], x[len(x) // 2 :]]))
    x = inputs()
    moved = np.abs(run(graph, params, x.at[:, 5].add(1.0))[0] - run(graph, params, x)[0]).max(-1)
    np.testing.assert_array_equal(np.flatnonzero(moved[1] > 1e-6), [5, *range(8, T)])


def test_a_gate_of_one_freezes_the_states():
    graph, params = make(forget_bias=lambda x: 0 * x + 40)
    memory = run(graph, params, inputs(), jnp.zeros((B, T), jnp.int32))[1]
    np.testing.assert_array_equal(memory.states, np.broadcast_to(params["start"], (B, S, 16)))


@pytest.mark.exhaustive
def test_pieces_of_whole_blocks_are_the_whole(lstm):
    """Also where the piece before ended in another document; and a row that is set back starts anew."""
    x = inputs()
    whole = run(*lstm, x, IDS)[0]
    graph, params = lstm
    memory, parts = nnx.merge(graph, params).empty(B), []
    for piece in (slice(0, 8), slice(8, T)):
        y, after = run(*lstm, x[:, piece], IDS[:, piece], memory)
        before, memory = memory, after
        parts.append(y)
    real = np.asarray(IDS >= 0)
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-5)
    assert memory.states.dtype == jnp.float32 and list(map(int, memory.count)) == [3 % W, (T - 8) % W]
    again = run(*lstm, x[:, :8], IDS[:, :8], forget(before, jnp.array([False, True])))[0]
    np.testing.assert_allclose(again[1], parts[0][1], rtol=1e-5, atol=1e-6)
    assert np.abs(again[0] - parts[0][0]).max() > 1e-3


def test_token_by_token_is_the_whole_and_leaves_the_same_memory(lstm):
    """From the start, and after prompts of unequal length."""
    x = inputs()
    whole, kept = run(*lstm, x)
    prompt = 6
    ids = jnp.where(jnp.arange(prompt) < jnp.array([[3], [prompt]]), 0, -1)
    graph, params = lstm
    for memory, begin in (
        (nnx.merge(graph, params).empty(B), jnp.array([0, 0])),
        (run(*lstm, x[:, :prompt], ids)[1], jnp.array([3, prompt])),
    ):
        for i in range(T - int(begin.max())):
            at = (begin + i)[:, None, None]
            y, memory = run(*lstm, jnp.take_along_axis(x, at, axis=1), None, memory)
            expected = jnp.take_along_axis(whole, at, axis=1)
            np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4, err_msg=f"token {i}")
    np.testing.assert_allclose(memory.states[1], kept.states[1], rtol=1e-4, atol=1e-5)
    assert int(memory.count[1]) == int(kept.count[1]) == T % W and int(memory.seen[1]) == int(kept.seen[1])


def test_keys_of_a_fresh_memory_are_not_read(lstm):
    """They are masked: a zero key would take a share of the softmax."""
    graph, params = lstm
    empty = nnx.merge(graph, params).empty(B)
    other = empty._replace(keys=empty.keys + 3, values=empty.values - 5, states=empty.states + 7)
    x = inputs()
    np.testing.assert_array_equal(run(*lstm, x, IDS, empty)[0], run(*lstm, x, IDS, other)[0])
    np.testing.assert_array_equal(run(*lstm, x, IDS, empty)[0], run(*lstm, x, IDS)[0])


def test_bfloat16_keeps_states_in_float32(lstm):
    graph, params = lstm
    y, memory = nnx.eval_shape(
        lambda: nnx.merge(graph, params)(inputs().astype(jnp.bfloat16), Past(None, None, True))
    )
    assert y.dtype == memory.keys.dtype == jnp.bfloat16 and memory.states.dtype == jnp.float32


def test_work_by_hand():
    # 4 heads of 8: a pair is 4 * 32 FLOPs; as many states as tokens make weights work once a token.
    pair = 4 * 32
    assert BlockRecurrent(4, 4).work(CONFIG).useful == pair * (4 + 8 + 4)
    assert BlockRecurrent(8, 4).work(CONFIG).useful < pair * (2 + 8 + 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(gate="gru"), ["gate='gru'", "'lstm'"]),
        (dict(cell="x"), ["'skip'"]),
        (dict(states=0), ["states=0"]),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UsageError) as error:
        BlockRecurrent(**options).check(CONFIG)
    assert all(word in str(error.value) for word in words)
