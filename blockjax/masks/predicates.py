"""Predicates: which key position a query position may see.

A predicate is a frozen pytree whose scalars are leaves, so that a window can be a traced value and
one compiled layer body can serve layers with different windows. Constructors do not validate; the
builders of `BlockMask` do.

Every predicate answers two questions: `visible(pq, pk)` for tokens and `classify(...)` for a tile
given the first and last position on each side. Those whose visible keys are one interval that moves
forward with the query also give `interval(pq)`, from which both answers and the *ranges* form of a
mask follow. Values are computed with NumPy while all leaves are concrete, so that a mask built inside
`jit` from Python numbers stays concrete.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2
"""What a predicate says of a tile: it holds nowhere, it must be tested, it holds everywhere."""

FULL_TAG = 0x80
"""Bit 7 of an entry's tag in a mask: the promise that its tile is full."""

FAR = 2**30
"""Farther than any position: int32, and the sum of one position and this does not overflow."""


def is_concrete(tree) -> bool:
    """True when no leaf is traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def array_module(*trees):
    """NumPy where everything is concrete, else jax.numpy."""
    return np if is_concrete(trees) else jnp


def same(a, b) -> bool:
    """Equal pytrees: the same traced objects, or concrete leaves of equal value."""
    a_leaves, a_def = jax.tree.flatten(a)
    b_leaves, b_def = jax.tree.flatten(b)
    return a_def == b_def and all(
        x is y or (is_concrete((x, y)) and np.array_equal(x, y))
        for x, y in zip(a_leaves, b_leaves, strict=True)
    )


class Predicate:
    """Base of all predicates; they combine with `&` and `|`."""

    def interval(self, pq):
        """Half-open `(first, stop)` of the key positions visible from `pq`, both non-decreasing in `pq`.

        None for a predicate that has no such interval.
        """
        return None

    def visible(self, pq, pk):
        """Boolean, broadcast from integer positions `pq` and `pk`."""
        first, stop = self.interval(pq)
        return (first <= pk) & (pk < stop)

    def classify(self, q_first, q_last, k_first, k_last):
        """EMPTY, PARTIAL or FULL (int8) for tiles with these inclusive position bounds, broadcast.

        FULL and EMPTY are promises; PARTIAL promises nothing.
        """
        first, stop_of_first = self.interval(q_first)
        first_of_last, stop = self.interval(q_last)
        full = (first_of_last <= k_first) & (k_last < stop_of_first)
        empty = (k_last < first) | (stop <= k_first)
        xp = array_module(full, empty)
        return xp.where(full, FULL, xp.where(empty, EMPTY, PARTIAL)).astype(np.int8)

    def __repr__(self) -> str:
        def show(x):
            if is_concrete(x) and not callable(x):
                return str(x)
            return getattr(x, "__name__", "traced")

        return f"{type(self).__name__}({', '.join(show(x) for x in vars(self).values())})"

    def __and__(self, other: "Predicate") -> "Predicate":
        if isinstance(self, Everything) or same(self, other):
            return other
        return self if isinstance(other, Everything) else And(self, other)

    def __or__(self, other: "Predicate") -> "Predicate":
        if isinstance(self, Everything) or same(self, other):
            return self
        return other if isinstance(other, Everything) else Or(self, other)


def _pytree(cls):
    """A frozen dataclass as a pytree; fields marked static are part of its structure.

    Not `register_dataclass`: structures made by it compare equal across classes with the same fields
    (jax 0.12), and `Causal` would pass for `Everything`.
    """
    cls = dataclass(frozen=True, eq=False, repr=False)(cls)
    static = tuple(f.name for f in fields(cls) if f.metadata.get("static"))
    leaves = tuple(f.name for f in fields(cls) if f.name not in static)

    def flatten(x):
        children = [(jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in leaves]
        return children, tuple(getattr(x, name) for name in static)

    def unflatten(values, children):
        return cls(**dict(zip(static, values, strict=True)), **dict(zip(leaves, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@_pytree
class Everything(Predicate):
    """Every key is visible."""

    def interval(self, pq):
        return 0 * pq - FAR, 0 * pq + FAR


@_pytree
class Causal(Predicate):
    """A query sees itself and everything before it: `pk <= pq`."""

    def interval(self, pq):
        return 0 * pq - FAR, pq + 1


@_pytree
class Window(Predicate):
    """`pq - left < pk <= pq + right`: `left` counts the query itself, so `right=0` sees `left` keys.

    Both may be traced and at most `FAR`; `left=FAR, right=0` is causal attention.
    """

    left: int | jax.Array
    right: int | jax.Array = 0

    def interval(self, pq):
        return pq - self.left + 1, pq + self.right + 1


@_pytree
class Chunked(Predicate):
    """Query and key lie in the same chunk of `size` consecutive positions."""

    size: int | jax.Array

    def interval(self, pq):
        first = pq // self.size * self.size
        return first, first + self.size


@_pytree
class Between(Predicate):
    """Keys at positions `first <= pk < stop`: those that exist, among zeros that fill blocks."""

    first: int | jax.Array
    stop: int | jax.Array

    def interval(self, pq):
        return 0 * pq + self.first, 0 * pq + self.stop


@_pytree
class Function(Predicate):
    """`fn(pq, pk, *args)` decides, element-wise; `args` are leaves and may be traced.

    `fn` is part of the compiled program's key: pass the same function object each time.
    """

    fn: Callable = field(metadata={"static": True})
    args: tuple = ()

    def visible(self, pq, pk):
        return self.fn(pq, pk, *self.args)

    def classify(self, q_first, q_last, k_first, k_last):
        shape = np.broadcast_shapes(np.shape(q_first), np.shape(k_first))
        return np.full(shape, PARTIAL, np.int8)


@_pytree
class And(Predicate):
    """Both hold."""

    a: Predicate
    b: Predicate

    def interval(self, pq):
        a, b = self.a.interval(pq), self.b.interval(pq)
        if a is None or b is None:
            return None
        xp = array_module(a, b)
        return xp.maximum(a[0], b[0]), xp.minimum(a[1], b[1])

    def visible(self, pq, pk):
        return self.a.visible(pq, pk) & self.b.visible(pq, pk)

    def classify(self, *bounds):
        a, b = self.a.classify(*bounds), self.b.classify(*bounds)
        return array_module(a, b).minimum(a, b)


@_pytree
class Or(Predicate):
    """At least one holds."""

    a: Predicate
    b: Predicate

    def visible(self, pq, pk):
        return self.a.visible(pq, pk) | self.b.visible(pq, pk)

    def classify(self, *bounds):
        a, b = self.a.classify(*bounds), self.b.classify(*bounds)
        return array_module(a, b).maximum(a, b)
