"""Pods by name; those of libtpu are opened in a process of their own."""

import json

import pytest

from blockjax.errors import UsageError
from blockjax.pods import libtpu
from blockjax.pods.chips import CHIPS
from blockjax.pods.topology import Topology, open_topology, parse, parse_mesh


class Device:
    def __init__(self, *coords):
        self.coords = [*coords, 0]


def test_names():
    chip, shape = parse("v5p:8x8x8")
    assert (chip.name, shape) == ("v5p", (8, 8, 8)) and chip.peak_flops == 459e12
    assert Topology(chip, shape, ()).name == "v5p:8x8x8"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5q:8x8x8", ["'v5q'", "'v5p'"]),
        ("v5p-1024", ["'v5p-1024'", "v5p:8x8x8", "tpu7x"]),
        ("v5e:16", ["'v5e:16'"]),
        ("v5e:0x4", ["'v5e:0x4'"]),
        ("", ["''"]),
    ],
)
def test_names_refused(name, words):
    with pytest.raises(UsageError) as error:
        parse(name)
    assert all(word in str(error.value) for word in words), error.value


def test_meshes():
    assert parse_mesh("data:8, fsdp:16,seq:-1") == dict(data=8, fsdp=16, seq=-1, tensor=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data=8", ["data:8,fsdp:16"]),
        ("data:8,fdsp:2", ["'fdsp'", "'fsdp'"]),
        ("data:8,data:2", ["'data'", "twice"]),
        ("", ["data:8"]),
    ],
)
def test_meshes_refused(text, words):
    with pytest.raises(UsageError) as error:
        parse_mesh(text)
    assert all(word in str(error.value) for word in words), error.value


def test_links():
    pod = Topology(CHIPS["v5p"], (4, 4, 8), ())
    ring = [Device(0, 0, z) for z in range(8)]
    assert pod.links(ring) == 2  # both ways around
    assert pod.links(ring[:4]) == 1  # a part of a ring is a line
    assert pod.links([Device(x, 0, z) for x in range(4) for z in range(8)]) == 4
    assert pod.links([Device(0, 0, 0)]) == 1
    # A v5e closes to rings only when it is whole.
    assert Topology(CHIPS["v5e"], (8, 16), ()).links([Device(x, 0) for x in range(8)]) == 1
    assert Topology(CHIPS["v5e"], (8, 16), ()).links([Device(0, y) for y in range(16)]) == 2


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(libtpu, "find", lambda: None)
    with pytest.raises(UsageError, match="pip install libtpu"):
        open_topology("v5p:2x2x1")


OPEN = """
import json, sys
from blockjax.errors import UsageError
from blockjax.parallel import make_mesh
from blockjax.pods.topology import open_topology, parse_mesh

found = {}
for name, mesh in json.loads(sys.argv[1]):
    try:
        pod = open_topology(name)
        placed = make_mesh(parse_mesh(mesh), pod.devices)
        group = [d for d in placed.devices[0, :, 0, 0]]
        found[name, mesh] = [len(pod.devices), pod.devices[0].device_kind == pod.chip.kind, pod.links(group)]
    except UsageError as error:
        found[name, mesh] = str(error)
print(json.dumps(list(found.items())))
"""
PODS = [
    # The example of the documentation: 16 is an axis of the torus and a quarter of another.
    ("v5p:8x8x8", "data:8,fsdp:16,seq:4", 512),
    ("v5p:8x8x8", "data:8,fsdp:64", 512),
    ("v5e:16x16", "fsdp:16,seq:16", 256),
    ("v6e:16x16", "fsdp:64,seq:4", 256),
    ("v4:4x4x4", "fsdp:-1", 64),
    ("v2:4x4", "fsdp:32", 32),
    ("v3:4x4", "fsdp:32", 32),
    ("tpu7x:4x4x4", "fsdp:16,seq:8", 128),
]
REFUSED = [
    ("v5e:3x3", "data:-1", ["v5e:3x3", "2x2x1"]),
    ("v5p:2x2x1", "data:3", ["data=3", "there are 4"]),
]


def test_every_family_opens_and_takes_meshes(python):
    asked = [[name, mesh] for name, mesh, _ in PODS + REFUSED]
    done = python("-c", OPEN, json.dumps(asked))
    assert done.returncode == 0, done.stderr[-2000:]
    found = {tuple(key): value for key, value in json.loads(done.stdout)}
    for name, mesh, devices in PODS:
        count, same_kind, links = found[name, mesh]
        assert count == devices and same_kind and 1 <= links <= 6, (name, found[name, mesh])
    assert {name.partition(":")[0] for name, _, _ in PODS} == set(CHIPS)
    for name, mesh, words in REFUSED:
        assert all(word in found[name, mesh] for word in words), found[name, mesh]
