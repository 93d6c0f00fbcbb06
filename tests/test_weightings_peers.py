"""The weightings beside TorchJD's and LibMTL's answers.

The peers are no judges: several are approximate, and the docstring of each weighting says where
and why. Here is how far they agree on gradients that are kind to both.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gradient_cases import Case
from torch import Tensor

from fastmto.reference import gradients as reference
from fastmto.weightings import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    DualProj,
    FairGrad,
    NashMTL,
    PCGrad,
    UPGrad,
)

CASES = [Case(n, kind) for kind in ("full", "conflicting") for n in (2, 3, 5, 8)]


@pytest.fixture
def torchjd() -> Iterator[Any]:
    aggregation = pytest.importorskip("torchjd.aggregation")
    for solver in ("cvxpy", "ecos", "quadprog", "qpsolvers"):
        pytest.importorskip(solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cvxpy, about ECOS
        yield aggregation


@pytest.fixture
def libmtl() -> Iterator[Any]:
    """LibMTL.weighting alone: the package itself imports models that need an old torchvision."""
    pytest.importorskip("scipy")
    spec = importlib.util.find_spec("LibMTL")
    if spec is None:
        pytest.skip("could not find 'LibMTL'")
    before = set(sys.modules)
    if "LibMTL" not in before:
        package = types.ModuleType("LibMTL")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["LibMTL"] = package
    yield importlib.import_module("LibMTL.weighting")
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "LibMTL":
            del sys.modules[name]


def gram_of(grads: np.ndarray) -> Tensor:
    return torch.from_numpy(grads @ grads.T)


def assert_same_direction(ours: Tensor, theirs: Any, grads: np.ndarray, tol: float) -> None:
    direction, other = ours.numpy() @ grads, np.asarray(theirs) @ grads
    size = (np.abs(ours.numpy()) * np.linalg.norm(grads, axis=1)).sum()
    np.testing.assert_allclose(direction, other, rtol=0, atol=tol * size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_mgda_is_never_shorter(torchjd: Any, case: Case) -> None:
    gram = gram_of(case.grads)
    ours, theirs = MGDA()(gram), torchjd.MGDAWeighting()(gram)
    assert ours @ gram @ ours <= theirs @ gram @ theirs * (1 + 1e-12)
    if case.tasks == 2:  # one Frank-Wolfe step is exact
        assert_same_direction(ours, theirs, case.grads, 1e-12)


def test_torchjd_mgda_ends_early(torchjd: Any) -> None:
    gram = gram_of(Case(8, "conflicting").grads)
    ours, theirs = MGDA()(gram), torchjd.MGDAWeighting()(gram)
    assert theirs @ gram @ theirs > 1.01 * (ours @ gram @ ours)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_cagrad_is_ours_without_rescaling(torchjd: Any, case: Case) -> None:
    gram = gram_of(case.grads)
    theirs = torchjd.CAGradWeighting(c=0.4)(gram)
    assert_same_direction(CAGrad(0.4, rescale=0)(gram), theirs, case.grads, 1e-4)


@pytest.mark.parametrize("method", ["UPGrad", "DualProj"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_projections_are_ours_without_their_ridge(
    torchjd: Any, case: Case, method: str
) -> None:
    linalg = pytest.importorskip("torchjd.linalg")
    projector = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
    gram = gram_of(case.grads)
    ours = {"UPGrad": UPGrad, "DualProj": DualProj}[method]()(gram)
    theirs = getattr(torchjd, f"{method}Weighting")(projector=projector)(gram)
    assert_same_direction(ours, theirs, case.grads, 1e-9)


def test_torchjd_ridge_lets_conflicts_through(torchjd: Any) -> None:
    grads = Case(3, "conflicting").grads * np.array([[1.0], [3.0], [100.0]])
    gram = gram_of(grads)
    lengths = gram.diagonal().sqrt()
    for name, ours in (("UPGrad", UPGrad()(gram)), ("DualProj", DualProj()(gram))):
        theirs = getattr(torchjd, f"{name}Weighting")()(gram)
        cosines = gram @ theirs / lengths / (theirs @ gram @ theirs).sqrt()
        assert cosines.min() < -1e-3
        assert (gram @ ours / lengths).min() >= -1e-12 * (ours @ lengths)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_imtl_g(torchjd: Any, case: Case) -> None:
    gram = gram_of(case.grads)
    assert_same_direction(IMTLG()(gram), torchjd.IMTLGWeighting()(gram), case.grads, 1e-11)


def test_torchjd_depends_on_the_units_of_the_gradients(torchjd: Any) -> None:
    """Answers for gradients that are only scaled, and ours, which have no unit."""
    gram = gram_of(Case(3, "full", seed=26).grads)
    zeros = torch.zeros(3, dtype=torch.float64)
    mean = torch.full_like(zeros, 1 / 3)
    for ours, theirs, c, refused in (
        (IMTLG(), torchjd.IMTLGWeighting(), 1e13, zeros),
        (CAGrad(rescale=0), torchjd.CAGradWeighting(c=0.4), 1e-4, zeros),
        (UPGrad(), torchjd.UPGradWeighting(), 1e-4, mean),
        (DualProj(), torchjd.DualProjWeighting(), 1e-4, mean),
    ):
        torch.testing.assert_close(theirs(c * c * gram), refused, rtol=1e-3, atol=0.0)
        torch.testing.assert_close(ours(c * c * gram), ours(gram), rtol=1e-10, atol=0.0)
    small = torchjd.FairGradWeighting(alpha=1.0)(1e-8 * gram)
    assert (small < 0.2 * FairGrad()(1e-8 * gram)).all()


def test_torchjd_imtl_g_drops_short_gradients(torchjd: Any) -> None:
    lengths = torch.tensor([1.0, 1e9], dtype=torch.float64)
    gram = lengths[:, None] * torch.tensor([[1.0, 0.5], [0.5, 1.0]]) * lengths
    torch.testing.assert_close(IMTLG()(gram), lengths.flip(0) / lengths.sum())
    assert torchjd.IMTLGWeighting()(gram)[0] < 1e-9


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_aligned_mtl(torchjd: Any, case: Case, scale: str) -> None:
    gram = gram_of(case.grads)
    theirs = torchjd.AlignedMTLWeighting(scale_mode=scale)(gram)
    assert_same_direction(AlignedMTL(scale)(gram), theirs, case.grads, 1e-11)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_fairgrad(torchjd: Any, case: Case, alpha: float) -> None:
    gram = gram_of(case.grads)
    theirs = torchjd.FairGradWeighting(alpha=alpha)(gram)
    assert_same_direction(FairGrad(alpha)(gram), theirs, case.grads, 1e-4)


@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_torchjd_nash_mtl(torchjd: Any, tasks: int) -> None:
    """Where the procedure's fixed point is the solution, as for gradients without conflict."""
    grads = Case(tasks, "aligned").grads
    theirs = torchjd.NashMTL(n_tasks=tasks, optim_niter=100)
    direction = theirs(torch.from_numpy(grads)).numpy()
    ours = NashMTL()(gram_of(grads)).numpy() @ grads
    assert np.linalg.norm(ours) == pytest.approx(1, rel=1e-9)
    np.testing.assert_allclose(direction, ours, atol=5e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchjd_pcgrad_with_its_orders(torchjd: Any, case: Case) -> None:
    gram, n = gram_of(case.grads), case.tasks
    torch.manual_seed(5)
    theirs = torchjd.PCGradWeighting()(gram)
    torch.manual_seed(5)
    orders = [[j for j in torch.randperm(n).tolist() if j != i] for i in range(n)]
    ours = given_orders(orders)(gram)
    assert_same_direction(ours, theirs, case.grads, 1e-13)


def given_orders(orders: list[list[int]]) -> PCGrad:
    class Given(PCGrad):
        def orders(self, n_tasks: int) -> Any:
            return np.array(orders).reshape(n_tasks, n_tasks - 1)

    return Given()


def libmtl_direction(method: type, grads: np.ndarray, **arguments: Any) -> np.ndarray:
    """The joint gradient of a LibMTL weighting for given gradients of the tasks."""
    rows = torch.from_numpy(grads).float()  # the dtype of LibMTL's own tensors
    taken: list[Tensor] = []

    class Given(method):  # type: ignore[misc]
        def _get_grads(self, losses: Any, mode: str = "backward") -> Tensor:
            return rows.clone()

        def _compute_grad(self, losses: Any, mode: str, rep_grad: bool = False) -> Tensor:
            return rows.clone()

        def _compute_grad_dim(self) -> None: ...

        def _backward_new_grads(self, batch_weight: Tensor, grads: Tensor) -> None:
            taken.append(batch_weight @ grads)

        def _reset_grad(self, new_grads: Tensor) -> None:
            taken.append(new_grads)

    weighting = Given()
    weighting.task_num, weighting.device, weighting.rep_grad = len(rows), "cpu", False
    weighting.init_param()
    weighting.backward(torch.ones(len(rows)), **arguments)
    return taken[0].detach().numpy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_libmtl_imtl_g(libmtl: Any, case: Case) -> None:
    theirs = libmtl_direction(libmtl.IMTL, case.grads)
    ours = IMTLG()(gram_of(case.grads)).numpy() @ case.grads
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("rescale", [0, 1, 2])
def test_libmtl_cagrad(libmtl: Any, rescale: int) -> None:
    """It is written for three tasks."""
    grads = Case(3, "conflicting").grads
    theirs = libmtl_direction(libmtl.CAGrad, grads, calpha=0.4, rescale=rescale)
    ours = CAGrad(0.4, rescale)(gram_of(grads)).numpy() @ grads
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.linalg.norm(grads))


def test_libmtl_mgda_applies_the_weights_to_the_normalised_gradients(libmtl: Any) -> None:
    grads = Case(2, "conflicting", decades=0.3).grads
    lengths = np.linalg.norm(grads, axis=1)
    np.testing.assert_allclose(
        MGDA()(gram_of(grads)).numpy() @ grads,
        libmtl_direction(libmtl.MGDA, grads, mgda_gn="none"),
        atol=1e-5,
    )
    w = MGDA("l2")(gram_of(grads)).numpy()
    theirs = libmtl_direction(libmtl.MGDA, grads, mgda_gn="l2")
    np.testing.assert_allclose(w @ (grads / lengths[:, None]), theirs, atol=1e-5)
    np.testing.assert_allclose(
        w @ grads, reference.normalised_mgda(grads, np.ones(2), "l2"), atol=1e-12
    )


def libmtl_orders(n: int) -> list[list[int]]:
    """The orders that LibMTL draws from Python's generator, a task itself included."""
    orders = []
    for _ in range(n):
        order = list(range(n))
        random.shuffle(order)
        orders.append(order)
    return orders


@pytest.mark.parametrize("tasks", [2, 3])
def test_libmtl_pcgrad_with_its_orders(libmtl: Any, tasks: int) -> None:
    grads = Case(tasks, "conflicting").grads
    random.seed(5)
    theirs = libmtl_direction(libmtl.PCGrad, grads)
    random.seed(5)
    orders = libmtl_orders(tasks)
    np.testing.assert_allclose(reference.pcgrad(grads, orders), theirs, atol=1e-5)
    others = [[j for j in order if j != i] for i, order in enumerate(orders)]
    ours = given_orders(others)(gram_of(grads)).numpy() @ grads
    np.testing.assert_allclose(ours, reference.pcgrad(grads, others), atol=1e-12)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_task_that_meets_itself_may_be_projected_again() -> None:
    """As in LibMTL: after two projections <g, g_1> < 0 is possible."""
    angles = np.deg2rad([0.0, 150.0, 210.0])
    grads = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    others = [[1, 2], [2, 0], [0, 1]]
    with_itself = [[1, 2, 0], [2, 0, 1], [0, 1, 2]]
    apart = reference.pcgrad(grads, with_itself) - reference.pcgrad(grads, others)
    assert np.linalg.norm(apart) > 1e-3
