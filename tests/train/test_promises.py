"""What README promises of training jobs names tests that exist."""

import importlib
import itertools
import pathlib
import re

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_every_promise_names_its_test():
    section = README.read_text().partition("## What a training job promises")[2].partition("\n## ")[0]
    rows = [
        line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| promise")
    ]
    named = [re.findall(r"`(test_\w+)\.py::(test_\w+)`", row) for row in rows]
    assert len(rows) >= 15 and all(named), rows
    for module, test in itertools.chain.from_iterable(named):
        assert callable(getattr(importlib.import_module(f"tests.train.{module}"), test)), test
