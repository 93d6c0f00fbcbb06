"""The GPU backend's checks and its choice between Triton and plain torch.

Its functions ask only that all tensors share a device, so where there is no GPU they run here on
the CPU, the Triton passes interpreted.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import (
    RULES,
    Case,
    Inputs,
    build,
    close,
    close_applied,
    expected_apply,
    expected_combine,
    expected_gradient_gram,
    expected_gram,
)

from fastmto.rules import Clippy

pytest.importorskip("triton")

from fastmto.ops import eager, gpu, triton_apply, triton_search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(inputs: Inputs, **changes: Any) -> dict[str, Any]:
    """Keywords of `delayed`."""
    made = {
        "rule": inputs.rule,
        "step": inputs.step,
        "grads": inputs.grads,
        "state": inputs.state,
        "params": inputs.params,
        "weights": inputs.weights,
        "gram": inputs.poisoned_gram(),
        "lr": inputs.lr,
        "weight_decay": inputs.weight_decay,
    }
    if inputs.clippy is not None:
        made |= {
            "clippy": inputs.clippy,
            "segments": inputs.segments,
            "sigma": inputs.poisoned_sigma(),
        }
    return made | changes


def only(keywords: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: keywords[name] for name in names if name in keywords}


@pytest.mark.parametrize("modifier", ["none", "clippy", "adatask", "both"])
def test_every_configuration_follows_the_reference(
    modifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clippy and AdaTask without Triton, everything else without plain torch."""
    unused = (
        [(eager, "search"), (eager, "apply"), (eager, "delayed")]
        if modifier == "none"
        else [(triton_search, "search"), (triton_search, "delayed"), (triton_apply, "apply")]
    )
    for module, name in unused:
        monkeypatch.delattr(module, name)
    host = build(
        Case(
            RULES["adam"],
            numel=401,
            padding=3,
            lr=0.5,
            clippy=Clippy() if modifier in ("clippy", "both") else None,
            adatask=modifier in ("adatask", "both"),
        )
    )
    inputs = host.to(DEVICE)
    searched = arguments(inputs)
    gpu.search(
        **only(
            searched,
            "rule",
            "step",
            "grads",
            "state",
            "gram",
            "clippy",
            "params",
            "lr",
            "segments",
            "sigma",
        )
    )
    sigma = searched.get("sigma")
    close(searched["gram"], expected_gram(host, sigma), torch.float32, name="gram")

    expected = expected_apply(host, sigma)
    after = inputs.clone()
    changes = {} if sigma is None else {"sigma": sigma, "segments": inputs.segments}
    applied = arguments(after) | changes
    applied.pop("gram")
    applied.pop("clippy", None)
    gpu.apply(**applied)
    close_applied(after.params, after.state, expected, host)

    at_once = inputs.clone()
    both = arguments(at_once)
    gpu.delayed(**both)
    close_applied(at_once.params, at_once.state, expected, host)
    assert torch.equal(both["gram"], searched["gram"])


def test_gram() -> None:
    host = build(Case(RULES["adam"], numel=401, padding=3))
    inputs = host.to(DEVICE)
    gram = inputs.poisoned_gram()
    gpu.gram(inputs.grads, gram)
    close(gram, expected_gradient_gram(host), torch.float32)
    with pytest.raises(ValueError, match=r"^grads"):
        gpu.gram(inputs.grads[0], gram)
    with pytest.raises(ValueError, match=r"^gram"):
        gpu.gram(inputs.grads, gram.float())


def test_combine_and_all_finite() -> None:
    host = build(Case(RULES["adam"], numel=401))
    inputs = host.to(DEVICE)
    out = torch.full_like(inputs.params, torch.nan)
    assert not gpu.all_finite(out)
    gpu.combine(inputs.grads, inputs.weights, out)
    close(out, expected_combine(host), torch.float32)
    assert gpu.all_finite(out)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("grads", torch.zeros(2, 802)[:, ::2]),
        ("grads", torch.zeros(2, 401, dtype=torch.int32)),
        ("grads", torch.zeros(0, 401)),
        ("grads", torch.zeros(401)),
        ("state", (torch.zeros(401),)),
        ("state", (torch.zeros(401), torch.zeros(400))),
        ("state", (torch.zeros(401), torch.zeros(401, dtype=torch.float64))),
        ("state", (torch.zeros(401), torch.zeros(802)[::2])),
        ("step", 0),
        ("state", (torch.zeros(2, 401), torch.zeros(2, 401))),
        ("params", torch.zeros(400)),
        ("params", torch.zeros(401, dtype=torch.float64)),
        ("weights", torch.zeros(2)),
        ("weights", torch.zeros(3, dtype=torch.float64)),
        ("gram", torch.zeros(2, 2)),
        ("gram", torch.zeros(2, 4, dtype=torch.float64)[:, ::2]),
    ],
)
def test_bad_arguments_are_named(name: str, bad: Any) -> None:
    inputs = build(Case(RULES["adam"], numel=401))
    with pytest.raises(ValueError, match=f"^{name}"):
        gpu.delayed(**arguments(inputs, **{name: bad}))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("step", [1]),
        ("step", [1, -1]),
        ("state", (torch.zeros(401), torch.zeros(401))),
        ("segments", torch.tensor([0, 400])),
        ("segments", torch.tensor([0, 300, 200, 401])),
        ("segments", torch.tensor([0.0, 401.0])),
        ("sigma", torch.ones(2, 9, dtype=torch.float64)),
        ("Clippy needs .* no sigma", {"sigma": None}),
        ("clippy", {"clippy": None}),
    ],
)
def test_bad_modifier_arguments_are_named(name: str, bad: Any) -> None:
    inputs = build(Case(RULES["adam"], numel=401, clippy=Clippy(), adatask=True))
    changes = bad if isinstance(bad, dict) else {name: bad}
    with pytest.raises(ValueError, match=f"^{name}"):
        gpu.delayed(**arguments(inputs, **changes))


def test_without_triton_the_import_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.reload(gpu)


def test_the_package_itself_does_not_import_triton() -> None:
    code = "import sys, fastmto; sys.exit('triton' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
