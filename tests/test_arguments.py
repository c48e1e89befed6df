import pytest

from blockjax.arguments import parse_arg, parse_choice
from blockjax.errors import UsageError

DEFAULTS = dict(size="nano", depth=4, rate=0.5, runlocal=False)
CHOICES = {"beta": dict(value=1.0, reversed=False), "plain": {}}


@pytest.mark.parametrize(
    ("arg", "values"),
    [
        (None, {}),
        ("", {}),
        ("350m", dict(size="350m")),
        ("350m,runlocal,depth=3", dict(size="350m", runlocal=True, depth=3)),
        ("depth=3, rate=1", dict(depth=3, rate=1.0)),
        ("runlocal", dict(runlocal=True)),
        ("runlocal=false", dict()),
        ("rate=1e-3,size=7b", dict(rate=1e-3, size="7b")),
    ],
)
def test_argument_strings_take_the_types_of_defaults(arg, values):
    parsed = parse_arg(arg, **DEFAULTS).to_dict()
    assert parsed == DEFAULTS | values
    assert all(type(value) is type(DEFAULTS[key]) for key, value in parsed.items())


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("nano,dept=3", ["'dept'", "'depth'"]),
        ("nano,350m", ["'350m'", "depth", "runlocal"]),
        ("depth=3.5", ["depth=3.5", "int", "4"]),
        ("depth=", ["depth=", "int"]),
        ("rate=fast", ["rate=fast", "float", "0.5"]),
        ("runlocal=perhaps", ["runlocal=perhaps", "bool"]),
    ],
)
def test_argument_strings_refused(arg, words):
    with pytest.raises(UsageError) as error:
        parse_arg(arg, **DEFAULTS)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("plain", "plain", {}),
        ("beta", "beta", dict(value=1.0, reversed=False)),
        ("beta:5,reversed", "beta", dict(value=5.0, reversed=True)),
    ],
)
def test_a_choice_has_options_of_its_own(text, kind, values):
    found, options = parse_choice(text, CHOICES, name="shape")
    assert (found, options.to_dict()) == (kind, values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bta:5", ["shape", "'bta'", "'beta'"]),
        ("beta:5,revers", ["'revers'", "'reversed'"]),
        ("plain:3", ["'3'"]),
    ],
)
def test_a_choice_refused(text, words):
    with pytest.raises(UsageError) as error:
        parse_choice(text, CHOICES, name="shape")
    assert all(word in str(error.value) for word in words), error.value
