"""Segments against a loop over tokens, and that nothing ahead of a token decides its segment."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockjax.errors import UsageError
from blockjax.locality.segments import Boundaries

B, T, V, M = 8, 48, 12, 5
MORE = 18  # tokens decoded after a prompt
CASES = {
    "fixed": Boundaries("fixed", 5),
    "fixed of one": Boundaries("fixed", 1),
    "delimiter": Boundaries("delimiter", 5, delimiters=(3, 7)),
    "delimiter of one": Boundaries("delimiter", 1, delimiters=(3, 7)),
    "adaptive": Boundaries("adaptive", 5, window=2, threshold=0.5),
    "adaptive of one token a side": Boundaries("adaptive", 3, window=1, threshold=-0.2),
}
every_case = pytest.mark.parametrize("boundaries", CASES.values(), ids=CASES)
one_of_each_kind = pytest.mark.parametrize("kind", ["fixed", "delimiter", "adaptive"])


@functools.partial(jax.jit, static_argnums=0)
def segments(boundaries, tokens, positions, table):
    return boundaries.segments(tokens, positions, table)


@functools.partial(jax.jit, static_argnums=0)
def prompt(boundaries, tokens, lengths, table):
    return boundaries.prompt(tokens, lengths, table)


@functools.partial(jax.jit, static_argnums=0)
def decode(boundaries, state, tokens, table):
    """Steps through tokens [B, n]: `(state, index [B, n])`."""

    def body(state, token):
        index, state = boundaries.step(state, token, table)
        return state, index

    state, index = jax.lax.scan(body, state, tokens.T)
    return state, index.T


def embedding(seed=0):
    return np.random.default_rng(seed).normal(size=(V, M)).astype(np.float32)


def packed(seed, rows=B):
    """Rows of several documents; half of them begin inside one, half of them end in padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (rows, T)).astype(np.int32)
    positions = np.zeros((rows, T), np.int32)
    for row in range(rows):
        column, offset = 0, int(rng.integers(1, 20)) * (row % 2)
        while column < T:
            count = int(rng.integers(1, 30))
            fragment = np.arange(offset, offset + count)[: T - column]
            positions[row, column : column + count] = fragment
            column, offset = column + count, 0
        if row % 4 >= 2:
            padding = rng.integers(1, 10)
            tokens[row, -padding:] = positions[row, -padding:] = 0
    return tokens, positions


def documents(positions):
    """Slices of one row, one a document."""
    starts = [t for t in range(len(positions)) if t == 0 or positions[t] == 0]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(positions)], strict=True)]


def oracle(b, tokens, table):
    """The segments of one document, in words: loops, float64, all past similarities kept in a list."""
    table = np.asarray(table, np.float64)
    fewest, most = {"fixed": (b.size, b.size)}.get(b.kind, (max(1, b.size // 2), 2 * b.size))
    past, index, begin, out = [], 0, 0, []
    for t in range(len(tokens)):
        candidate = b.kind == "delimiter" and t >= 1 and tokens[t - 1] in b.delimiters
        if b.kind == "adaptive" and t - 2 * b.window >= 0:
            x = np.mean([table[tokens[i]] for i in range(t - b.window, t)], axis=0)
            y = np.mean([table[tokens[i]] for i in range(t - 2 * b.window, t - b.window)], axis=0)
            c = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            candidate = len(past) >= 2 and c < np.mean(past) - b.threshold * np.std(past) - 1e-5
            past.append(c)
        if t - begin == most or (candidate and t - begin >= fewest):
            index, begin = index + 1, t
        out.append(index)
    return out


def oracle_rows(b, tokens, positions, table):
    rows = zip(tokens, positions, strict=True)
    return np.array([[i for d in documents(p) for i in oracle(b, row[d], table)] for row, p in rows])


@every_case
@pytest.mark.parametrize("seed", range(4))
def test_segments_are_those_of_a_loop_over_tokens(boundaries, seed):
    tokens, positions = packed(seed)
    index = segments(boundaries, tokens, positions, embedding())
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(index, oracle_rows(boundaries, tokens, positions, embedding()))


def test_evidence_decides_something():
    """Otherwise the tests of "delimiter" and "adaptive" would be those of forced ends only."""
    tokens, positions = packed(0)
    for kind in ("delimiter", "adaptive"):
        index = segments(CASES[kind], tokens, positions, embedding())
        forced = segments(Boundaries("fixed", 2 * CASES[kind].size), tokens, positions, None)
        assert np.mean(np.asarray(index) != forced) > 0.3


def test_without_jit_and_with_a_bfloat16_table():
    tokens, lengths = packed(0)[0], np.full(B, T)
    table = jnp.asarray(embedding(), jnp.bfloat16)
    index, state = CASES["adaptive"].prompt(tokens, lengths, table)
    expected_index, expected = prompt(CASES["adaptive"], tokens, lengths, table.astype(jnp.float32))
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(state.mean, expected.mean, atol=1e-6)


def leaks(boundaries) -> bool:
    """Whether a segment up to some t changes with the tokens, or a document's end, after t."""
    for seed, t in enumerate([0, 3, 11, 20, 29, 38, T - 2]):
        tokens, positions = packed(seed)
        others, _ = packed(seed + 100)
        index = np.asarray(segments(boundaries, tokens, positions, embedding()))[:, : t + 1]
        changed = np.where(np.arange(T) > t, others, tokens)
        ended = np.where(np.arange(T) > t, np.arange(T) - t - 1, positions)
        for where in (positions, ended):
            if np.any(index != segments(boundaries, changed, where, embedding())[:, : t + 1]):
                return True
    return False


@every_case
def test_no_later_token_changes_a_segment(boundaries):
    assert not leaks(boundaries)


class LooksAhead(Boundaries):
    """Wrong on purpose: the evidence at t ends with token t + 1."""

    def _evidence(self, tokens, past, table):
        return super()._evidence(jnp.roll(tokens, -2, axis=1), past, table)


@pytest.mark.parametrize("kind", ["delimiter", "adaptive"])
def test_evidence_from_ahead_is_caught(kind):
    assert leaks(LooksAhead(**vars(CASES[kind])))


@every_case
def test_a_packed_document_is_segmented_as_alone(boundaries):
    tokens, positions = packed(5)
    index = segments(boundaries, tokens, positions, embedding())
    alone = np.zeros_like(tokens), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for row in range(B):
        parts = documents(positions[row])[:B]
        for i, part in enumerate(parts):
            alone[0][i, : part.stop - part.start] = tokens[row, part]
        again = segments(boundaries, *alone, embedding())
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(index[row, part], again[i, : part.stop - part.start])


@every_case
def test_sizes_lie_within_the_limits(boundaries):
    tokens, positions = packed(6)
    index = np.asarray(segments(boundaries, tokens, positions, embedding()))
    least, most = boundaries.limits
    for row in range(B):
        for part in documents(positions[row]):
            sizes = np.bincount(index[row, part])
            assert np.all(sizes[:-1] >= least) and np.all(sizes <= most) and sizes[-1] >= 1


@one_of_each_kind
def test_prompt_and_steps_agree_with_whole_rows(kind):
    tokens, _ = packed(7)
    table = embedding()
    whole = np.asarray(segments(CASES[kind], tokens, np.tile(np.arange(T), (B, 1)), table))
    lengths = np.array([1, 2, 3, 4, 5, 9, 20, T - MORE])
    padded = np.where(np.arange(T) < lengths[:, None], tokens, 3)  # padding of delimiters
    index, state = prompt(CASES[kind], padded, lengths, table)
    columns = lengths[:, None] + np.arange(MORE)
    end, decoded = decode(CASES[kind], state, np.take_along_axis(tokens, columns, 1), table)
    for row in range(B):
        np.testing.assert_array_equal(index[row, : lengths[row]], whole[row, : lengths[row]])
        assert np.all(index[row, lengths[row] :] == whole[row, lengths[row] - 1])
    np.testing.assert_array_equal(decoded, np.take_along_axis(whole, columns, 1))
    _, expected = prompt(CASES[kind], tokens, lengths + MORE, table)
    for name, x in vars(expected).items():
        got = getattr(end, name)
        assert (got.shape, got.dtype) == (x.shape, x.dtype), name
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_turn_of_topic_ends_a_segment_at_once():
    """Two vocabularies around two directions: a cut lies within a window of the first new token."""
    rng = np.random.default_rng(0)
    topics = np.repeat(np.eye(2, M), V // 2, axis=0) + 0.1 * rng.normal(size=(V, M))
    same = rng.integers(0, V // 2, (B, T))
    turned = np.where(np.arange(T) < 24, same, same + V // 2)
    b, positions = Boundaries("adaptive", 40, window=4, threshold=6.0), np.tile(np.arange(T), (B, 1))

    def cut(tokens):
        index = np.asarray(segments(b, tokens, positions, topics))
        return index[:, 24 + 4] > index[:, 24]

    assert np.all(cut(turned)) and not np.any(cut(same))


def test_rounding_ends_no_segment_in_repetitive_text():
    """Every similarity is 1 but for the order of the sums, and a threshold of 0 leaves no room."""
    rng = np.random.default_rng(0)
    tokens, lengths = np.tile(rng.integers(0, V, (B, 3)), T // 3), np.full(B, T - MORE)
    b = Boundaries("adaptive", 4, window=3, threshold=0.0)
    index, state = prompt(b, tokens, lengths, embedding())
    _, decoded = decode(b, state, tokens[:, -MORE:], embedding())
    np.testing.assert_array_equal(index[:, :-MORE], np.tile(np.arange(T - MORE) // 8, (B, 1)))
    np.testing.assert_array_equal(decoded, np.tile(np.arange(T - MORE, T) // 8, (B, 1)))


def test_embeddings_of_zero_are_no_evidence():
    tokens, _ = packed(8)
    _, state = prompt(CASES["adaptive"], tokens, np.full(B, T), np.zeros((V, M), np.float32))
    assert np.all(np.isfinite(state.mean)) and np.all(np.isfinite(state.m2))


def test_no_gradient_reaches_the_table():
    tokens, _ = packed(9)
    b, table = CASES["adaptive"], jnp.asarray(embedding())
    _, state = prompt(b, tokens, np.full(B, T), table)

    def similarity(table):
        return jnp.sum(b.step(state, tokens[:, 0], table)[1].mean)

    assert similarity(table) != similarity(2 * table + 1)
    assert not np.any(jax.grad(similarity)(table))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "adaptiv"}, "'adaptiv'.*Did you mean 'adaptive'"),
        ({"size": 0}, "size=0 .*1 or more"),
        ({"window": 0}, "window=0 .*1 or more"),
        ({"threshold": float("nan")}, "threshold=nan .*finite"),
        ({"threshold": float("inf")}, "threshold=inf .*finite"),
        ({"delimiters": ()}, r"delimiters=\(\).*\(10,\)"),
    ],
)
def test_a_field_out_of_range_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(Boundaries("delimiter", 16), **change)
