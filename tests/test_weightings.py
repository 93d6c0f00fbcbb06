"""Weightings: Gram in, weights out; subsets of tasks, failures, state."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from samplers import gram

from fastmto import weightings
from fastmto.errors import SolverError
from fastmto.solvers import bargaining
from fastmto.weightings import Bargaining, Constant, Equal, Weighting

G4 = torch.from_numpy(gram(np.random.default_rng(1), 4, decades=0.5))
OPPOSITE = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


def subset(tasks: list[int]) -> torch.Tensor:
    return G4[tasks][:, tasks]


@pytest.mark.parametrize("method", ["exact", "ccp"])
def test_bargaining_is_the_solver(method: str) -> None:
    weighting = Bargaining(method)
    weights = weighting(G4)
    assert weights.dtype == torch.float64
    assert torch.equal(weights, bargaining(G4, method).weights)
    assert weighting.result is not None
    assert weighting.result.status == "solved"


def test_failure_is_a_solver_error_with_its_status() -> None:
    weighting = Bargaining()
    with pytest.raises(SolverError, match="near_stationary") as caught:
        weighting(OPPOSITE)
    assert caught.value.status == "near_stationary"
    assert weighting.result is not None
    assert weighting.result.weights is None
    with pytest.raises(SolverError) as caught:
        weighting(torch.full((2, 2), torch.nan, dtype=torch.float64))
    assert caught.value.status == "not_finite"
    assert Bargaining(ridge=0.1)(OPPOSITE).isfinite().all()


def test_preferences_follow_the_tasks() -> None:
    p = [1.0, 2.0, 3.0, 4.0]
    weighting = Bargaining(preference=p)
    a = weighting(subset([1, 3]), [1, 3])
    product = a * (subset([1, 3]) @ a)
    torch.testing.assert_close(product, torch.tensor([2.0, 4.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="4 tasks of preference"):
        weighting(subset([0, 1]))
    with pytest.raises(ValueError, match="4 tasks of preference"):
        weighting(subset([0, 1]), [0, 4])


def test_warm_start_respects_the_tasks_and_resumes_bit_for_bit() -> None:
    weighting = Bargaining(warm_start=True)
    weighting(subset([0, 2]), [0, 2])
    weighting(subset([0, 1]), [0, 1])  # task 1 has no last weight: a cold start
    assert weighting.result is not None
    assert weighting.result.iterations == bargaining(subset([0, 1])).iterations
    weighting(G4)
    weighting(G4)
    assert weighting.result.iterations == 0

    buffer = io.BytesIO()
    torch.save(weighting.state_dict(), buffer)
    buffer.seek(0)
    resumed = Bargaining(warm_start=True)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    next_gram = G4 + 0.1 * torch.diag(G4.diagonal())
    assert torch.equal(resumed(next_gram), weighting(next_gram))
    assert resumed.state_dict() == weighting.state_dict()

    weighting.reset()
    assert weighting.state_dict() == {"last": {}}
    assert weighting.result is None
    assert torch.equal(weighting(G4), Bargaining()(G4))


def test_cold_weighting_keeps_no_state() -> None:
    weighting = Bargaining()
    weighting(G4)
    assert weighting.state_dict() == {"last": {}}
    with pytest.raises(ValueError, match="state must hold 'last'"):
        weighting.load_state_dict({"first": {}})


def test_constant_and_equal() -> None:
    assert Equal()(G4).tolist() == [1.0] * 4
    constant = Constant([1.0, 2.0, 0.0, 4.0])
    assert constant(G4).tolist() == [1.0, 2.0, 0.0, 4.0]
    assert constant(subset([1, 3]), [1, 3]).tolist() == [2.0, 4.0]
    assert constant.state_dict() == {}
    constant.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state"):
        constant.load_state_dict({"last": 1})
    with pytest.raises(ValueError, match="gram must have 4 tasks"):
        constant(subset([0, 1]))


@pytest.mark.parametrize("weighting", [Bargaining("ccp"), Constant([1.0] * 4), Equal()])
def test_copies_and_pickles(weighting: Weighting) -> None:
    expected = weighting(G4)
    for twin in (copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))):
        assert torch.equal(twin(G4), expected)
        assert repr(twin) == repr(weighting)


def test_wrong_tasks() -> None:
    for tasks in ([0], [0, 0, 1, 2]):
        with pytest.raises(ValueError, match="tasks must hold 4 different indices"):
            Equal()(G4, tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nash"}, "method must be"),
        ({"tol": 2.0}, "tol must lie in"),
        ({"ridge": -1.0}, "ridge must lie in"),
        ({"method": "ccp", "max_steps": 0}, "max_steps must lie in"),
        ({"preference": [1.0, 0.0]}, "preference must be positive"),
    ],
)
def test_bargaining_refuses_at_construction(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bargaining(**arguments)


@pytest.mark.parametrize("weights", [[], [1.0, -1.0], [float("inf")]])
def test_constant_refuses(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite"):
        Constant(weights)


def test_repr() -> None:
    assert repr(Bargaining()) == "Bargaining(method='exact')"
    assert (
        repr(Bargaining("ccp", [1, 2], warm_start=True, max_steps=5))
        == "Bargaining(method='ccp', preference=[1.0, 2.0], max_steps=5, warm_start=True)"
    )


def test_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Weighting()  # type: ignore[abstract]


@pytest.mark.parametrize("kind", ["full", "low_rank", "near_opposite"])
@pytest.mark.parametrize(
    "make",
    [
        weightings.Bargaining,
        lambda: Bargaining("ccp"),
        lambda: weightings.NashMTL(0.1),
        Equal,
        lambda: Constant([1.0, 2.0, 3.0, 4.0]),
        lambda: weightings.CAGrad(5.0),
        lambda: weightings.FairGrad(3.0),
        weightings.PCGrad,
        weightings.UPGrad,
        lambda: weightings.DualProj([1.0, 2.0, 0.1, 1.0]),
    ],
)
def test_positive_weightings_are(make, kind: str) -> None:
    weighting = make()
    assert weighting.positive
    for seed in range(5):
        matrix = torch.from_numpy(gram(np.random.default_rng(seed), 4, kind, decades=1.0))
        try:
            assert bool((weighting(matrix) > 0).all())
        except SolverError:
            assert kind != "full" or weighting.result.status == "unbounded"


def test_those_that_may_be_zero_or_negative_are_not_called_positive() -> None:
    for weighting in (
        Constant([0.0, 1.0]),
        weightings.MGDA(),
        weightings.IMTLG(),
        weightings.AlignedMTL(),
        weightings.UPGrad([0.0, 1.0]),
    ):
        assert not weighting.positive


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_held_weights_keep_to_the_bound(max_norm: float | None) -> None:
    weighting = weightings.NashMTL(max_norm)
    last = torch.full((4,), 100.0, dtype=torch.float64)
    held = weighting.hold(G4, last)
    if max_norm is None:
        assert torch.equal(held, last)
    else:
        torch.testing.assert_close((held @ G4 @ held).sqrt(), torch.ones((), dtype=torch.float64))
        short = torch.full((4,), 1e-9, dtype=torch.float64)
        assert torch.equal(weighting.hold(G4, short), short)
        assert torch.equal(weighting.hold(G4 * torch.nan, last), last)
    assert torch.equal(last, torch.full((4,), 100.0, dtype=torch.float64))
    assert torch.equal(weightings.UPGrad().hold(G4, last), last)
