import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from blockjax.models import Transformer
from blockjax.train import loss
from blockjax.train.loss import chunk_size, cross_entropy
from blockjax.train.state import init_state
from blockjax.train.step import BATCH_KEYS, make_train_step
from tests.jaxprs import arrays
from tests.models.tiny import tiny_config

B, T, M, V = 3, 24, 8, 50


def dense(hidden, head, targets, z_loss):
    """Loss, and its gradients with respect to `hidden` and `head`, in float64 with logits [B, T, V]."""
    hidden, head = np.float64(hidden), np.float64(head)
    logits = hidden @ head
    lse = np.log(np.exp(logits).sum(-1))
    counts = targets >= 0
    hit = np.eye(V)[np.maximum(targets, 0)]
    total = (counts * (lse - (hit * logits).sum(-1) + z_loss * lse**2)).sum()
    softmax = np.exp(logits - lse[..., None])
    dlogits = counts[..., None] * (softmax * (1 + 2 * z_loss * lse[..., None]) - hit)
    return total, (dlogits @ head.T, np.einsum("BTM,BTV->MV", hidden, dlogits))


@pytest.fixture
def inputs():
    draw = np.random.default_rng(0)
    targets = draw.integers(0, V, (B, T), np.int32)
    targets[0, 5:] = -1
    targets[2] = -7
    return np.float32(draw.normal(size=(B, T, M))), np.float32(draw.normal(size=(M, V))), targets


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunks", [1, 2, 6, 24])
def test_equals_a_dense_reference(monkeypatch, inputs, chunks, z_loss):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", B * T // chunks * V)
    assert chunk_size(B, T, V) == T // chunks
    hidden, head, targets = inputs

    def objective(hidden, head):
        return cross_entropy(hidden, head, targets, z_loss)

    (value, sums), grads = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(hidden, head)
    expected, expected_grads = dense(hidden, head, targets, z_loss)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
    assert sums.tokens == (targets >= 0).sum()
    assert not np.any(np.asarray(grads[0])[targets < 0])


def test_without_targets_there_is_no_loss(inputs):
    hidden, head, targets = inputs
    total = lambda *a: cross_entropy(*a, np.full_like(targets, -1), 0.1)[0]  # noqa: E731
    value, grads = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    assert value == 0 and not any(np.any(g) for g in grads)


@pytest.mark.parametrize(
    ("rows", "tokens", "vocab"), [(4, 8192, 32768), (64, 2048, 50257), (3, 97, 1 << 25), (1, 7, 1 << 28)]
)
def test_a_chunk_divides_the_sequence(rows, tokens, vocab):
    size = chunk_size(rows, tokens, vocab)
    assert tokens % size == 0 and (rows * size * vocab <= loss.CHUNK_LOGITS or size == 1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logits_never_exist_whole_in_float32(monkeypatch, accumulate):
    rows, tokens, vocab = 4, 256, 32768
    config = tiny_config(vocab_size=vocab, dtype="bfloat16")
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    optimizer = optax.sgd(1.0)
    batch = {key: jax.ShapeDtypeStruct((rows, tokens), jnp.int32) for key in BATCH_KEYS}

    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows * tokens * vocab // 4)

    def largest_float32() -> int:
        step = make_train_step(nnx.graphdef(model), optimizer, z_loss=0.1, accumulate=accumulate)
        state = jax.eval_shape(lambda: init_state(Transformer(config, rngs=nnx.Rngs(0)), optimizer))
        jaxpr = jax.make_jaxpr(step)(state, batch)
        return max(a.size for a in arrays(jaxpr.jaxpr) if getattr(a, "dtype", None) == jnp.float32)

    microbatch = rows // accumulate * tokens * vocab
    assert largest_float32() <= microbatch // 2
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1 << 40)
    assert largest_float32() >= microbatch
