"""What `import fastmto` costs, and that nothing of its public names is lost by it."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmto


def test_import_brings_next_to_nothing() -> None:
    """Modules, not seconds: a count does not depend on the machine's load."""
    program = (
        "import json, sys; before = set(sys.modules); import fastmto; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    path = str(Path(fastmto.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    modules = json.loads(done.stdout)
    assert [name for name in modules if name.startswith("fastmto")] == ["fastmto"]
    assert not {"torch", "numpy"} & set(modules)
    assert len(modules) < 40  # typing and importlib's, of some thousand that torch brings


@pytest.mark.parametrize("name", fastmto.__all__)
def test_every_public_name_is_what_the_type_checker_sees(name: str) -> None:
    assert name in dir(fastmto)
    seen = {}
    for node in ast.walk(ast.parse(Path(fastmto.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                assert alias.asname == alias.name  # what re-exports a name in a typed package
                seen[alias.name] = f"fastmto.{node.module}" if node.module else "fastmto"
    assert set(seen) == set(fastmto.__all__)
    value = getattr(fastmto, name)
    assert value is getattr(importlib.import_module(seen[name]), name)
    assert value is getattr(fastmto, name)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'fastmto' has no attribute 'fly'"):
        fastmto.fly  # noqa: B018
