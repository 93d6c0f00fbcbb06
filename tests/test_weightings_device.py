"""What weightings hand out to find their weights where the Gram matrix lies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from samplers import gram
from torch import Tensor

import fastmto
from fastmto import ops, weightings
from fastmto.errors import SolverError
from fastmto.solvers import STATUSES
from fastmto.weightings import MGDA, Bargaining, Constant, Equal, NashMTL, Weighting

POWERS = [1.0, 4.0, 0.5, 2.0, 1.0]
THERE = [
    Bargaining(),
    Bargaining(preference=POWERS),
    Bargaining(ridge=0.1, tol=1e-6),
    NashMTL(),
    NashMTL(max_norm=0.5, preference=POWERS),
    NashMTL(max_norm=0.5, ridge=0.3),
    NashMTL(max_norm=None),
    MGDA(),
    MGDA("l2"),
    Equal(),
    Constant(POWERS),
]
NOT_THERE = [
    Bargaining("ccp"),
    Bargaining(warm_start=True),
    NashMTL(method="ccp"),
    weightings.CAGrad(),
    weightings.UPGrad(),
    weightings.IMTLG(),
    weightings.PCGrad(),
]


def solved(weighting: Weighting, matrix: Tensor, tasks=None) -> tuple[Tensor, Tensor]:
    """Weights and info, NaN where nothing was written."""
    solve = weighting.device_solver(len(POWERS))
    assert solve is not None
    weights = torch.full((len(matrix),), torch.nan, dtype=torch.float64)
    info = torch.full((4,), torch.nan, dtype=torch.float64)
    before = matrix.clone()
    solve(matrix, weights, info, tasks)
    assert torch.equal(matrix, before)
    return weights, info


@pytest.mark.parametrize("weighting", THERE, ids=repr)
@pytest.mark.parametrize("kind", ["full", "zero", "low_rank"])
def test_the_weights_are_those_of_a_call(weighting, kind):
    for number in range(4):
        rng = np.random.default_rng([number, 7])
        matrix = torch.from_numpy(gram(rng, 5, "full" if kind == "zero" else kind, decades=1.0))
        if kind == "zero":
            matrix[2], matrix[:, 2] = 0.0, 0.0
        for tasks in (None, [1, 4], [0, 2, 3]):
            part = matrix if tasks is None else matrix[tasks][:, tasks].contiguous()
            weights, info = solved(weighting, part, tasks)
            status = STATUSES[int(info[0])]
            if status != "solved":
                assert weights.isnan().all()
                with pytest.raises(SolverError) as caught:
                    weighting(part, tasks)
                assert caught.value.status == status
                continue
            assert torch.equal(weights, weighting(part, tasks))
            if weighting.result is not None:
                assert info[1:].tolist() == [
                    weighting.result.iterations,
                    weighting.result.residual,
                    weighting.result.kappa,
                ]


@pytest.mark.parametrize("weighting", NOT_THERE, ids=repr)
def test_others_need_the_host(weighting):
    assert weighting.device_solver(2) is None


def test_hyperparameters_may_be_changed():
    weighting, matrix = NashMTL(ridge=0.1), torch.eye(5, dtype=torch.float64)
    solve = weighting.device_solver(5)
    for name, value in (("max_norm", 0.1), ("ridge", 1.0), ("max_norm", None)):
        setattr(weighting, name, value)
        weights, info = torch.zeros(5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        solve(matrix, weights, info, None)
        assert torch.equal(weights, weighting(matrix))


def _overriding(weighting: Weighting, **methods) -> Weighting:
    """The weighting as an instance of a subclass with these methods."""
    changed = copy.deepcopy(weighting)
    changed.__class__ = type("Changed", (type(weighting),), methods)
    return changed


@pytest.mark.parametrize("weighting", THERE, ids=repr)
def test_a_subclass_with_another_call_needs_the_host(weighting):
    assert _overriding(weighting).device_solver(2) is not None
    assert _overriding(weighting, reset=lambda self: None).device_solver(2) is not None
    steps = [x for x in ("__call__", "_solve", "_powers") if hasattr(weighting, x)]
    for step in steps:
        method = lambda self, *args: None  # noqa: E731
        changed = _overriding(weighting, **{step: method})
        assert changed.device_solver(2) is None
        assert _overriding(changed).device_solver(2) is None
        told = _overriding(changed, device_solver=lambda self, n_tasks: print)
        assert told.device_solver(2) is print


def test_pub_does_not_go_past_a_subclass():
    class Capped(NashMTL):
        def __call__(self, gram: Tensor, tasks=None) -> Tensor:
            return super().__call__(gram, tasks).clamp(max=0.1)

    x = torch.nn.Parameter(torch.ones(2))
    losses = [x.square().sum(), (x - 3).square().sum()]
    with pytest.raises(ValueError, match=r"capturable .* Capped.* is found on the host"):
        fastmto.PUB([x], [], weighting=Capped(), capturable=True).backward(losses)


def test_the_ops_have_a_largest_number_of_tasks():
    most = ops.MAX_SOLVED_TASKS
    for weighting in (Bargaining(), NashMTL(), MGDA()):
        assert weighting.device_solver(most) is not None
        assert weighting.device_solver(most + 1) is None
    assert Equal().device_solver(most + 1) is not None


def test_tasks_that_do_not_fit_are_refused():
    eye = torch.eye(2, dtype=torch.float64)
    for weighting in (Bargaining(preference=POWERS), Constant(POWERS)):
        with pytest.raises(ValueError, match="gram must"):
            solved(weighting, eye)
        with pytest.raises(ValueError, match="gram must"):
            solved(weighting, eye, [0, 5])
