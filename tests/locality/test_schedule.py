import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockjax.errors import UsageError
from blockjax.locality import Locality
from blockjax.masks.predicates import FAR


def table(text, depth=5, context=1024):
    return Locality.parse(text, context).table(depth)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0, 0, 0, 0, 0]),
        ("beta:1", [0, 0.25, 0.5, 0.75, 1]),
        ("beta:2", [0, 1 / 16, 1 / 4, 9 / 16, 1]),
        ("beta:0", [1, 1, 1, 1, 1]),
        ("beta:1,reversed", [1, 0.75, 0.5, 0.25, 0]),
        ("beta:1,low=0.2,high=0.6", [0.2, 0.3, 0.4, 0.5, 0.6]),
        ("constant:0.3", [0.3] * 5),
        ("step:0.5", [0, 0, 1, 1, 1]),
        ("periodic:2", [1, 0, 1, 0, 1]),
        ("table:0/1/0.5/0/1", [0, 1, 0.5, 0, 1]),
    ],
)
def test_schedules(text, expected):
    np.testing.assert_allclose(table(text), expected, rtol=1e-6)
    assert table(text).dtype == np.float32


@pytest.mark.parametrize("beta", [0.5, 1, 3, 5])
def test_a_power_rises_from_low_to_high(beta):
    rising = table(f"beta:{beta}", 12)
    assert rising[0] == 0 and rising[-1] == 1 and np.all(np.diff(rising) > 0)
    np.testing.assert_array_equal(table(f"beta:{beta},reversed", 12), rising[::-1])
    assert table(f"beta:{beta}", 1) == [1]


def test_quintic_is_mostly_dense():
    """Means for 12 layers, from the sum of (l / 11)**beta."""
    means = [table(f"beta:{b}", 12).mean() for b in (1, 3, 5)]
    np.testing.assert_allclose(means, [0.5, 0.273, 0.198], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("constant:0", "window", [FAR, 512, 256, 64]),
        ("constant:0,smallest=1", "window", [FAR, 181, 32, 1]),
        ("constant:0,mode=segment,smallest=16", "group", [FAR, 23, 8, 1]),
        ("constant:0,mode=bias,smallest=16", "slope", [0, 0.0625, 0.125, 0.25]),
    ],
)
def test_columns(text, column, expected):
    rule = Locality.parse(text, 1024)
    x = np.float32([0, 0.25, 0.5, 1])
    ((name, known),) = rule.columns(x).items()
    assert name == column and isinstance(known, np.ndarray)
    np.testing.assert_array_equal(known, expected)
    ((_, traced),) = jax.jit(rule.columns)(jnp.asarray(x)).items()
    np.testing.assert_array_equal(traced, known)
    assert traced.dtype == known.dtype


def test_a_context_below_the_smallest_window_is_full():
    assert Locality.parse("constant:1,smallest=64", 32).columns(1.0)["window"] == 32
    assert Locality.parse("constant:1,mode=segment,smallest=64", 32).columns(0.5)["group"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bta:5", ["'bta'", "'beta'"]),
        ("beta:5,mod=bias", ["'mod'", "'mode'"]),
        ("beta:5,mode=windows", ["mode='windows'", "'window'"]),
        ("beta:-1", ["beta:-1", "[0, inf]"]),
        ("constant:1.5", ["constant:1.5", "[0, 1]"]),
        ("periodic:0", ["periodic:0"]),
        ("beta:1,low=0.5,high=0.2", ["low=0.5", "high=0.2"]),
        ("beta:1,smallest=0", ["smallest=0"]),
        ("beta:1,boundary=sentence", ["boundary='sentence'", "'delimiter'"]),
        ("beta:1,delimiters=a/b", ["delimiters='a/b'"]),
        ("table:0/2/0", ["table:0/2/0", "[0, 1]"]),
        ("table:0/x", ["value='0/x'"]),
        ("table:0/1", ["2 values for 5 layers"]),
    ],
)
def test_refused(text, words):
    with pytest.raises(UsageError) as error:
        table(text)
    assert all(word in str(error.value) for word in words), error.value
