"""Layers are tested over the oracles of their ops, which compile in a third of the time."""

import pytest


@pytest.fixture(autouse=True)
def oracles(dense_attention, monkeypatch):
    from blockjax.kernels.linear_attention import api, reference

    monkeypatch.setattr(api, "BACKENDS", {"reference": reference})
