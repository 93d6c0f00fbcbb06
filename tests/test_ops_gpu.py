"""The GPU backend's checks, and what it launches.

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
from reads import NothingIsRead

from fastmto.ops import cpu
from fastmto.optim.rules import Adam, Clippy

pytest.importorskip("triton")

from fastmto.ops.triton import apply as triton_apply
from fastmto.ops.triton import backend as gpu
from fastmto.ops.triton import clippy as triton_clippy
from fastmto.ops.triton import combine as triton_combine
from fastmto.ops.triton import gram as triton_gram
from fastmto.ops.triton import rules as triton_rules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Clippy and whether every task keeps its own moments.
MODIFIERS = {
    "plain": (None, False),
    "clippy": (Clippy(), False),
    "adatask": (None, True),
    "both": (Clippy(), True),
}


def inputs_of(modifier: str, n_tasks: int = 2) -> Inputs:
    clippy, adatask = MODIFIERS[modifier]
    case = Case(RULES["adam"], n_tasks, 401, clippy=clippy, adatask=adatask, padding=3, lr=0.5)
    return build(case)


def arguments(inputs: Inputs, **changes: Any) -> dict[str, Any]:
    """Keywords of `apply_and_gram`."""
    made = {
        "kind": inputs.kind,
        "numbers": inputs.numbers,
        "grads": inputs.grads,
        "state": inputs.state,
        "params": inputs.params,
        "weights": inputs.weights,
        "gram": inputs.poisoned_gram(),
    }
    if inputs.clippy is not None:
        made |= {
            "clippy": inputs.lambdas,
            "segments": inputs.segments,
            "sigma": inputs.poisoned_sigma(),
        }
    return made | changes


def of_search(keywords: dict[str, Any]) -> dict[str, Any]:
    """Of the keywords of `apply_and_gram` those of `update_gram`."""
    return {k: v for k, v in keywords.items() if k not in ("weights", "skip")} | (
        {} if "clippy" in keywords else {"params": None}
    )


def of_apply(keywords: dict[str, Any]) -> dict[str, Any]:
    """Of the keywords of `apply_and_gram` those of `apply`."""
    return {k: v for k, v in keywords.items() if k not in ("gram", "clippy")}


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_every_configuration_follows_the_reference(modifier: str) -> None:
    host = inputs_of(modifier)
    inputs = host.to(DEVICE)
    searched = arguments(inputs)
    gpu.update_gram(**of_search(searched))
    sigma = searched.get("sigma")
    close(searched["gram"], expected_gram(host, sigma), torch.float32, name="gram")

    expected = expected_apply(host, sigma)
    after = inputs.clone()
    changes = {} if sigma is None else {"sigma": sigma}
    gpu.apply(**of_apply(arguments(after, **changes)))
    close_applied(after.params, after.state, expected, host)

    at_once = inputs.clone()
    both = arguments(at_once)
    gpu.apply_and_gram(**both)
    close_applied(at_once.params, at_once.state, expected, host)
    close(both["gram"], expected_gram(host, sigma), torch.float32, name="gram of delayed")
    assert sigma is None or torch.equal(both["sigma"], sigma)


def test_skip() -> None:
    inputs = inputs_of("both").to(DEVICE)
    skip = torch.ones(1, dtype=torch.int32, device=DEVICE)
    for op, select in ((gpu.apply, of_apply), (gpu.apply_and_gram, dict)):
        after = inputs.clone()
        sigma = torch.ones_like(inputs.poisoned_sigma())
        op(**select(arguments(after, skip=skip, sigma=sigma)))
        assert torch.equal(after.params, inputs.params)
        assert all(torch.equal(a, b) for a, b in zip(after.state, inputs.state, strict=True))


class Launches:
    """Stands in for `launch`: only says what would run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        for module in (triton_gram, triton_apply, triton_clippy, triton_combine):
            monkeypatch.setattr(module, "launch", self)

    def __call__(self, kernel: Any, *args: Any, **constants: Any) -> None:
        self.kernels.append(kernel.fn.__name__)

    def take(self) -> list[str]:
        taken, self.kernels = self.kernels, []
        return taken


@pytest.mark.parametrize("n_tasks", [2, 9])
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_one_launch_a_pass_and_one_more_with_clippy_and_nothing_is_read(
    modifier: str, n_tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(modifier, n_tasks)
    skip = torch.zeros(1, dtype=torch.int32)
    launches = Launches(monkeypatch)
    before = ["factors_kernel"] if inputs.clippy is not None else []
    search = "gram_pairs" if n_tasks <= 8 else "gram_tiles"
    with NothingIsRead():
        gpu.update_gram(**of_search(arguments(inputs)))
        assert launches.take() == [*before, search]
        gpu.apply_and_gram(**arguments(inputs, skip=skip))
        assert launches.take() == [*before, search]
        gpu.apply(**of_apply(arguments(inputs, skip=skip)))
        assert launches.take() == ["apply_kernel"]
        gpu.gram(inputs.grads, inputs.poisoned_gram())
        gpu.combine(inputs.grads, inputs.weights, torch.empty_like(inputs.params))
        assert launches.take() == [search, "combine_kernel"]


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


def test_combine() -> None:
    host = build(Case(RULES["adam"], numel=401))
    inputs = host.to(DEVICE)
    out = torch.full_like(inputs.params, torch.nan)
    gpu.combine(inputs.grads, inputs.weights, out)
    close(out, expected_combine(host), torch.float32)


def test_every_kind_has_its_number_of_states() -> None:
    for rule in RULES.values():
        assert triton_rules.N_STATES[rule.kind] == len(rule.state_names)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("grads", torch.zeros(2, 802)[:, ::2]),
        ("grads", torch.zeros(401).expand(2, 401)),
        ("grads", torch.zeros(2, 401, dtype=torch.int32)),
        ("grads", torch.zeros(0, 401)),
        ("grads", torch.zeros(401)),
        ("kind", 6),
        ("kind", -1),
        ("state", [torch.zeros(401)]),
        ("state", [torch.zeros(401), torch.zeros(400)]),
        ("state", [torch.zeros(401), torch.zeros(401, dtype=torch.float64)]),
        ("state", [torch.zeros(401), torch.zeros(802)[::2]]),
        ("state", [torch.zeros(401), torch.zeros(2, 401)]),
        ("numbers", torch.zeros(2, 11, dtype=torch.float64)),
        ("numbers", torch.zeros(1, 11)),
        ("numbers", torch.zeros(1, 10, dtype=torch.float64)),
        ("params", torch.zeros(400)),
        ("params", torch.zeros(401, dtype=torch.float64)),
        ("weights", torch.zeros(2)),
        ("weights", torch.zeros(3, dtype=torch.float64)),
        ("gram", torch.zeros(2, 2)),
        ("gram", torch.zeros(2, 4, dtype=torch.float64)[:, ::2]),
        ("skip", torch.zeros(1)),
        ("skip", torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_bad_arguments_are_named(name: str, bad: Any) -> None:
    inputs = build(Case(RULES["adam"], numel=401))
    with pytest.raises(ValueError, match=f"^{name}"):
        gpu.apply_and_gram(**arguments(inputs, **{name: bad}))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("numbers", torch.zeros(1, 11, dtype=torch.float64)),
        ("state", [torch.zeros(2, 401), torch.zeros(401)]),
        ("state", [torch.zeros(2, 401), torch.zeros(3, 401)]),
        ("state", [torch.zeros(2, 401), torch.zeros(2, 802)[:, ::2]]),
        ("segments", torch.tensor([0])),
        ("segments", torch.tensor([[0, 401]])),
        ("segments", torch.tensor([0.0, 401.0])),
        ("segments", None),
        ("sigma", torch.ones(2, 9, dtype=torch.float64)),
        ("sigma", torch.ones(2, 6)),
        ("sigma", None),
        ("clippy", None),
        ("clippy", (0.5,)),
    ],
)
def test_bad_modifier_arguments_are_named(name: str, bad: Any) -> None:
    inputs = inputs_of("both")
    with pytest.raises(ValueError, match=f"^{name}"):
        gpu.apply_and_gram(**arguments(inputs, **{name: bad}))


def test_a_search_with_clippy_needs_the_parameters() -> None:
    keywords = of_search(arguments(inputs_of("clippy")))
    for bad in (None, torch.zeros(400)):
        with pytest.raises(ValueError, match=r"^params"):
            gpu.update_gram(**keywords | {"params": bad})


def test_without_triton_the_import_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.reload(gpu)


def test_the_package_itself_does_not_import_triton() -> None:
    code = "import sys, fastmto; sys.exit('triton' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("backend", [cpu, gpu], ids=["cpu", "gpu"])
def test_a_small_weight_decay_survives_float32(backend: Any) -> None:
    """1 - 1e-5 in float32 is off by .14 % of the 1e-5, always the same way."""
    device = "cpu" if backend is cpu else DEVICE
    params = (1 + torch.arange(4096, dtype=torch.float32, device=device) / 4096).contiguous()
    before = params.double()
    numbers = torch.tensor([Adam().numbers(1, 1e-3, 1e-2)], dtype=torch.float64, device=device)
    state = [torch.zeros_like(params) for _ in range(2)]
    grads = torch.zeros(1, 4096, device=device)
    weights = torch.ones(1, dtype=torch.float64, device=device)
    backend.apply(0, numbers, grads, state, params, weights)
    decay = ((before - params.double()) / before).mean().item()
    assert decay == pytest.approx(1e-5, rel=5e-4)
