"""Every Python block of the documentation runs, and every docstring example says the truth."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import peers
import pytest

import fastmto

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]
BLOCKS = [
    (f"{page.relative_to(ROOT)}:{n}", block)
    for page in sorted(PAGES)
    for n, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]
#: What an integration needs to be imported; skips where it is missing.
PEERS = {
    "fastmto.integrations.torchjd": peers.torchjd,
    "fastmto.integrations.libmtl": peers.libmtl,
}
NEEDS_A_GPU_LIBRARY = ("triton", "gpu")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(fastmto.__path__, "fastmto.")
    if not module.name.rpartition(".")[2].startswith(("_", *NEEDS_A_GPU_LIBRARY))
]


@pytest.mark.parametrize("block", [b for _, b in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_code_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "<documentation>", "exec"), {"__name__": "__main__"})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    PEERS.get(name, lambda: None)()
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert doctest.testmod(module).failed == 0


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 2
