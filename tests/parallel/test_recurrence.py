"""Recurrence over a sequence that is cut across devices is that of one device, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blockjax.kernels.linear_attention import api
from jax.sharding import AxisType

import blockjax as bj
from blockjax.errors import UsageError
from blockjax.parallel import Layout, recurrence
from blockjax.parallel import linear_attention as sharded
from tests.jaxprs import equations
from tests.kernels.linear_attention_suite import FORMS, assert_close, cotangents_of, make

T = 77
# Documents end at no device's border; one spans several devices, some devices see several.
IDS = np.repeat([[0, 4, 5, -1, 2, 3]], 2, 0).repeat([5, 30, 2, 3, 31, 6], axis=1)
IDS[1] = [0] * 60 + [1] * 17


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def arguments(form, **changes):
    kind, decay = form
    return make(kind=kind, decay=decay, **dict(B=2, T=T, N=4, K=2, Hk=8, Hv=12, rate=0.3) | changes)


def both(call, args, cotangents):
    out, pullback = jax.vjp(lambda args: call(**args, return_state=True), args)
    return out, pullback(cotangents)[0]


@functools.cache
def expected(form, documents):
    """Of one device, by the oracle."""
    args = arguments(form)
    call = functools.partial(
        bj.linear_attention, kind=form[0], segment_ids=IDS if documents else None, implementation="reference"
    )
    return jax.jit(functools.partial(both, call))(args, cotangents_of(args))


def compare(form, devices, layout, documents=True):
    args = arguments(form)
    call = functools.partial(
        sharded, kind=form[0], mesh=mesh_of(seq=devices), layout=layout, chunk_size=8,
        segment_ids=IDS if documents else None,
    )  # fmt: skip
    found = jax.jit(functools.partial(both, call))(args, cotangents_of(args))
    assert_close(found, expected(form, documents), 3e-5)


CASES = [
    (("decay", "token"), 4, "zigzag", True),
    (("decay", "head"), 2, "contiguous", False),
    (("delta", "channel"), 2, "zigzag", True),
    (("delta", "token"), 8, "contiguous", True),
]
EXHAUSTIVE = [
    (form, devices, layout, documents)
    for form in FORMS
    for devices in (2, 4, 8)
    for layout in ("contiguous", "zigzag")
    for documents in (False, True)
    if (form, devices, layout, documents) not in CASES
]


@pytest.mark.parametrize(
    ("form", "devices", "layout", "documents"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EXHAUSTIVE)],
)
def test_many_devices_are_one(form, devices, layout, documents):
    compare(form, devices, layout, documents)


def test_arrays_that_lie_in_a_layout_and_other_axes_of_the_mesh():
    """Batch and heads are cut too; `o` comes back as it lies."""
    layout = Layout.of("zigzag", 64, 2, 8)
    args, ids = arguments(("decay", "token"), T=64), IDS[:, :64]
    expected = bj.linear_attention(**args, segment_ids=ids, return_state=True, implementation="reference")
    laid = {name: layout.apply(x) if x.shape[1] == 64 else x for name, x in args.items()}
    call = functools.partial(
        sharded, mesh=mesh_of(data=2, seq=2, tensor=2), layout=layout, batch="data", heads="tensor",
        segment_ids=layout.apply(jnp.asarray(ids)), return_state=True, chunk_size=8,
    )  # fmt: skip
    o, state = jax.jit(lambda args: call(**args))(laid)
    assert_close((layout.restore(o), state), expected, 3e-5)


def test_one_device_along_the_axis():
    args = arguments(("delta", "token"), T=24)
    args.pop("initial_state")
    call = functools.partial(sharded, kind="delta", mesh=mesh_of(data=2, seq=1), batch="data")
    expected = bj.linear_attention(**args, kind="delta", implementation="reference")
    assert_close(jax.jit(lambda args: call(**args))(args), expected, 3e-5)


@pytest.mark.parametrize("call", [bj.linear_attention, functools.partial(sharded, axis="seq")])
def test_backends_learn_that_tokens_share_a_decay(call, monkeypatch):
    """With documents they are given one for each token: its gradients are to be summed."""
    seen = []

    def backend(*args):
        chosen, options = select(*args)
        seen.append(options.shared_decay)
        return chosen, options

    select = api.select
    for module in (api, recurrence):
        monkeypatch.setattr(module, "select", backend)
    for decay in ("head", "token"):
        args = arguments(("decay", decay))
        mesh = {} if call is bj.linear_attention else dict(mesh=mesh_of(seq=1))
        jax.eval_shape(functools.partial(call, kind="decay", segment_ids=IDS, **mesh), **args)
    assert seen == [True, False]


@pytest.mark.parametrize(("devices", "rounds"), [(2, 1), (4, 3), (8, 4)])
def test_maps_are_composed_in_log_rounds(devices, rounds):
    """Of one map each, forward; nothing is gathered."""
    args = arguments(("decay", "token"), T=64)
    call = functools.partial(sharded, mesh=mesh_of(seq=devices))
    program = jax.make_jaxpr(lambda args: call(**args))(args)
    found = [e.primitive.name for e in equations(program.jaxpr)]
    assert found.count("ppermute") == 2 * rounds  # M and N
    assert not {"all_gather", "all_to_all", "psum"} & set(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layout="striped"), "over the layouts contiguous, zigzag, not 'striped'"),
        (dict(axis="sequence"), "no axis 'sequence'; its axes are: seq"),
        (dict(heads="seq"), r"2 heads do not divide over seq=4"),
        (
            dict(layout=Layout.of("contiguous", 64, 4, 16)),
            "for 64 tokens on 4 devices, but .* 77 on 4",
        ),
        (dict(layout=Layout.of("striped", 77, 4, 10)), "not 'striped'"),
    ],
)
def test_mistakes(changes, message):
    args = arguments(("decay", "token"))
    layout = changes.get("layout")
    if isinstance(layout, Layout) and layout.length == T:
        args = {name: layout.apply(x) if x.shape[1] == T else x for name, x in args.items()}
    with pytest.raises(UsageError, match=message):
        sharded(**dict(args, mesh=mesh_of(seq=4), **changes))
