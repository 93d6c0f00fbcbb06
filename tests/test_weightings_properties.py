"""What all weightings have in common, and how each answers to rescaled gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_cases import KINDS, REGULAR, Array, Case, cases
from torch import Tensor

from fastmto import weightings
from fastmto.errors import SolverError
from fastmto.weightings import (
    IMTLG,
    MGDA,
    AlignedMTL,
    Bargaining,
    CAGrad,
    Constant,
    DualProj,
    Equal,
    FairGrad,
    NashMTL,
    PCGrad,
    UPGrad,
    Weighting,
)

#: One of each, for three tasks.
MAKE: dict[str, Callable[[], Weighting]] = {
    "MGDA": MGDA,
    "MGDA l2": lambda: MGDA("l2"),
    "CAGrad": CAGrad,
    "CAGrad 2": lambda: CAGrad(0.7, rescale=2),
    "IMTLG": IMTLG,
    "UPGrad": UPGrad,
    "UPGrad preference": lambda: UPGrad([1.0, 0.0, 2.5]),
    "DualProj": DualProj,
    "DualProj preference": lambda: DualProj([1.0, 0.0, 2.5]),
    "NashMTL": NashMTL,
    "NashMTL ccp": lambda: NashMTL(max_norm=0.5, method="ccp", warm_start=True),
    "NashMTL preference": lambda: NashMTL(preference=[1.0, 3.0, 2.5]),
    "FairGrad": FairGrad,
    "FairGrad 2": lambda: FairGrad(2.0),
    "AlignedMTL": AlignedMTL,
    "AlignedMTL rmse": lambda: AlignedMTL("rmse"),
    "PCGrad": lambda: PCGrad(seed=7),
    "Bargaining": Bargaining,
    "Bargaining preference": lambda: Bargaining(preference=[1.0, 3.0, 2.5], warm_start=True),
    "Constant": lambda: Constant([1.0, 0.0, 2.5]),
    "Equal": Equal,
}
#: Without options that are per task, without chance, and with an answer for every regular case.
SYMMETRIC = [
    name
    for name in MAKE
    if name not in ("PCGrad", "Constant", "NashMTL ccp") and "preference" not in name
]
EVERY = pytest.mark.parametrize("name", MAKE)


def gram_of(grads: Array) -> Tensor:
    return torch.from_numpy(grads @ grads.T)


#: Two conflicts, which the convex-concave procedure too can start from (all (G 1)_i > 0).
GRADS = Case(3, "full", seed=26).grads
GRAM = gram_of(GRADS)


def test_all_are_here() -> None:
    made = {type(make()).__name__ for make in MAKE.values()}
    others = {"DeviceSolver", "Weighting", "SolverWeighting", "Function", "as_weighting"}
    assert made | others == set(weightings.__all__)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_in_the_dtype_of_the_gram(name: str, dtype: torch.dtype) -> None:
    gram = GRAM.to(dtype)
    weights = MAKE[name]()(gram)
    assert weights.dtype == dtype
    assert weights.shape == (3,)
    # Found in float64 whatever the dtype: only the answer is rounded.
    wide = MAKE[name]()(gram.double())
    torch.testing.assert_close(
        weights.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY
def test_weights_come_back_on_the_device_of_the_gram(name: str) -> None:
    gram = GRAM.cuda()
    weights = MAKE[name]()(gram)
    assert weights.device == gram.device
    torch.testing.assert_close(weights.cpu(), MAKE[name]()(GRAM), rtol=1e-12, atol=0.0)


@EVERY
def test_the_gram_is_only_read(name: str) -> None:
    weighting, gram = MAKE[name](), GRAM.clone()
    first = weighting(gram)
    kept = first.clone()
    second = weighting(2 * gram)
    assert torch.equal(gram, GRAM)
    assert torch.equal(first, kept), "the weights of one call are written by the next"
    assert first.data_ptr() != second.data_ptr()


@EVERY
def test_layout_and_graph_do_not_matter(name: str) -> None:
    expected = MAKE[name]()(GRAM)
    storage = torch.full((6, 6), torch.nan, dtype=torch.float64)
    storage[::2, ::2] = GRAM
    assert torch.equal(MAKE[name]()(storage[::2, ::2]), expected)
    weights = MAKE[name]()(GRAM.clone().requires_grad_())
    assert torch.equal(weights, expected)
    assert not weights.requires_grad


@EVERY
def test_tasks_say_which_rows_there_are(name: str) -> None:
    assert torch.equal(MAKE[name]()(GRAM, [0, 1, 2]), MAKE[name]()(GRAM))
    some = GRAM[[0, 2]][:, [0, 2]]
    weights = MAKE[name]()(some, [0, 2])
    assert weights.shape == (2,)
    if "preference" not in name and name != "Constant":
        assert torch.equal(weights, MAKE[name]()(some))
    for tasks in ([0], [0, 0], [-1, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="tasks must hold 2 different indices"):
            MAKE[name]()(some, tasks)


@pytest.mark.parametrize("name", [n for n in MAKE if "preference" in n])
def test_preferences_follow_the_tasks(name: str) -> None:
    some = GRAM[[0, 2]][:, [0, 2]]
    weighting = MAKE[name]()
    twin = copy.copy(weighting)
    twin.preference = weighting.preference[[0, 2]]  # type: ignore[attr-defined]
    assert torch.equal(weighting(some, [0, 2]), twin(some))
    for tasks in (None, [0, 3]):
        with pytest.raises(ValueError, match="3 tasks of preference"):
            weighting(some, tasks)


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("kind", REGULAR)
def test_tasks_may_be_renamed(name: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    for case in cases((kind,), (2, 3, 5, 8)):
        if case.decades > 3 or (case.decades > 0 and name.startswith("Aligned")):
            continue  # Aligned-MTL: a rank that rounding decides
        gram = gram_of(case.grads)
        order = rng.permutation(case.tasks)
        weights, renamed = MAKE[name]()(gram), MAKE[name]()(gram[order][:, order])
        size = weights.abs() * gram.diagonal().sqrt()
        difference = (renamed - weights[order]) * gram.diagonal().sqrt()[order]
        assert difference.abs().max() <= 1e-8 * size.max(), str(case)


#: weights(c^2 G) = c^power weights(G).
POWERS = {
    "MGDA": 0.0,
    "MGDA l2": 0.0,
    "CAGrad": 0.0,
    "CAGrad 2": 0.0,
    "IMTLG": 0.0,
    "UPGrad": 0.0,
    "UPGrad preference": 0.0,
    "DualProj": 0.0,
    "DualProj preference": 0.0,
    "NashMTL": -1.0,
    "NashMTL preference": -1.0,
    "FairGrad": -1.0,
    "FairGrad 2": -4 / 3,
    "AlignedMTL": 0.0,
    "AlignedMTL rmse": 0.0,
    "PCGrad": 0.0,
    "Bargaining": -1.0,
    "Bargaining preference": -1.0,
    "Constant": 0.0,
    "Equal": 0.0,
}


@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("c", [1e-12, 1e-3, 30.0, 1e12])
def test_longer_gradients(name: str, c: float) -> None:
    weights = MAKE[name]()(c * c * GRAM)
    torch.testing.assert_close(weights, c ** POWERS[name] * MAKE[name]()(GRAM), rtol=1e-9, atol=0.0)


LENGTHS = torch.tensor([1e-4, 3.0, 1e5], dtype=torch.float64)


@pytest.mark.parametrize("name", ["IMTLG", "NashMTL", "NashMTL preference", "FairGrad"])
def test_lengths_do_not_turn_the_direction(name: str) -> None:
    scaled = LENGTHS[:, None] * GRAM * LENGTHS
    direction = MAKE[name]()(scaled) * LENGTHS
    expected = MAKE[name]()(GRAM)
    if name == "IMTLG":  # whose weights sum to 1
        direction, expected = direction / direction.norm(), expected / expected.norm()
    torch.testing.assert_close(direction, expected, rtol=1e-8, atol=0.0)


def test_mgda_l2_does_not_see_lengths() -> None:
    scaled = LENGTHS[:, None] * GRAM * LENGTHS
    torch.testing.assert_close(MGDA("l2")(scaled), MGDA("l2")(GRAM), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(MGDA("l2")(GRAM), MGDA()(cosines(GRAM)), rtol=1e-9, atol=0.0)


def cosines(gram: Tensor) -> Tensor:
    lengths = gram.diagonal().sqrt()
    return gram / lengths[:, None] / lengths


@pytest.mark.parametrize("make", [UPGrad, lambda: PCGrad(seed=7)])
def test_directions_that_are_linear_in_the_lengths(make: Callable[[], Weighting]) -> None:
    """d(c g) + d(c' g) = d((c + c') g) for lengths c, c' > 0 of the tasks."""
    rng = np.random.default_rng(1)
    for case in cases(REGULAR, (2, 3, 5)):
        if case.decades > 3:
            continue
        n = case.tasks
        c = rng.uniform(0.5, 2.0, size=(2, n))
        first, second, both = (
            make()(gram_of(s[:, None] * case.grads)).numpy() * s @ case.grads
            for s in (c[0], c[1], c.sum(axis=0))
        )
        size = np.linalg.norm(case.grads, axis=1).max()
        np.testing.assert_allclose(first + second, both, atol=1e-9 * size, err_msg=str(case))


def test_a_length_turns_what_claims_to_see_it() -> None:
    scaled = LENGTHS[:, None] * GRAM * LENGTHS
    for make in (MGDA, CAGrad, DualProj, AlignedMTL, lambda: FairGrad(2.0)):
        before, after = make()(GRAM), make()(scaled) * LENGTHS
        cosine = before @ GRAM @ after / ((before @ GRAM @ before) * (after @ GRAM @ after)).sqrt()
        assert cosine < 1 - 1e-3, make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_projections_conflict_with_no_task(name: str, kind: str) -> None:
    for case in cases((kind,)):
        gram = gram_of(case.grads)
        weights, lengths = MAKE[name]()(gram), gram.diagonal().sqrt()
        size = (weights.abs() * lengths).sum()
        assert (gram @ weights / lengths).min() >= -1e-12 * size, str(case)


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_descends_on_all_tasks(kind: str) -> None:
    for case in cases((kind,)):
        gram = gram_of(case.grads)
        w, lengths = MGDA()(gram), gram.diagonal().sqrt()
        assert w.min() >= 0
        assert w.sum().item() == pytest.approx(1, rel=1e-14)
        allowed = 1e-12 * lengths * (w @ lengths)
        assert (gram @ w - w @ gram @ w >= -allowed).all(), str(case)


def test_nash_bargains_for_all_tasks() -> None:
    a = NashMTL(max_norm=None)(GRAM)
    torch.testing.assert_close(a * (GRAM @ a), torch.ones(3, dtype=torch.float64))
    p = torch.tensor([1.0, 3.0, 2.5], dtype=torch.float64)
    a = NashMTL(max_norm=0, preference=p)(GRAM)
    torch.testing.assert_close(a * (GRAM @ a), p)


@pytest.mark.parametrize("method", ["exact", "ccp"])
@pytest.mark.parametrize("preference", [None, [1.0, 3.0, 2.5]])
def test_nash_clips_the_joint_gradient(method: str, preference: list[float] | None) -> None:
    free = NashMTL(None, method, preference)
    a = free(GRAM)
    length = float((a @ GRAM @ a).sqrt())
    if method == "exact":
        assert length == pytest.approx(np.sqrt(3.0 if preference is None else 6.5), rel=1e-12)
    assert torch.equal(NashMTL(2 * length, method, preference)(GRAM), a)
    clipped = NashMTL(0.25, method, preference)
    torch.testing.assert_close(clipped(GRAM), a * (0.25 / length), rtol=1e-12, atol=0.0)
    some = GRAM[[0, 2]][:, [0, 2]]
    b = free(some, [0, 2])
    expected = b * (0.25 / (b @ some @ b).sqrt())
    torch.testing.assert_close(clipped(some, [0, 2]), expected, rtol=1e-12, atol=0.0)


def test_nash_ridge_is_not_in_the_length() -> None:
    opposite = torch.tensor([[1.0, -0.99], [-0.99, 1.0]], dtype=torch.float64)
    w = NashMTL(ridge=0.1)(opposite)
    a = Bargaining(ridge=0.1)(opposite)
    length = float((a @ opposite @ a).sqrt())
    torch.testing.assert_close(w, a * min(1.0, 1 / length), rtol=1e-12, atol=0.0)
    assert length < np.sqrt(2) - 0.1


@pytest.mark.parametrize("c", [0.0, 0.4, 1.5])
def test_cagrad_rescales(c: float) -> None:
    raw = CAGrad(c, rescale=0)(GRAM)
    torch.testing.assert_close(CAGrad(c)(GRAM), raw / (1 + c * c), rtol=1e-15, atol=0.0)
    torch.testing.assert_close(CAGrad(c, rescale=2)(GRAM), raw / (1 + c), rtol=1e-15, atol=0.0)
    if c == 0:
        torch.testing.assert_close(raw, torch.full((3,), 1 / 3, dtype=torch.float64))


ZERO = torch.zeros(3, 3, dtype=torch.float64)
ONE_ZERO = GRAM * torch.tensor([1.0, 0.0, 1.0])[:, None] * torch.tensor([1.0, 0.0, 1.0])
NEEDS_ALL = ["IMTLG", "NashMTL", "NashMTL preference", "FairGrad", "FairGrad 2", "Bargaining"]
TAKES_ZERO = ["MGDA", "MGDA l2", "CAGrad", "UPGrad", "DualProj", "PCGrad", "AlignedMTL"]


@pytest.mark.parametrize("gram", [ZERO, ONE_ZERO], ids=["all zero", "one zero"])
def test_zero_gradients(gram: Tensor) -> None:
    for name in NEEDS_ALL:
        weighting = MAKE[name]()
        with pytest.raises(SolverError, match=f"no {type(weighting).__name__} weights") as caught:
            weighting(gram)
        assert caught.value.status == "zero_update", name
        assert weighting.result is not None
        assert weighting.result.status == "zero_update"
    for name in TAKES_ZERO:
        assert MAKE[name]()(gram).isfinite().all(), name
    # A zero gradient is the shortest point, and adds nothing to the mean.
    if gram is ONE_ZERO:
        assert MGDA()(gram).tolist() == [0.0, 1.0, 0.0]
        assert MGDA("l2")(gram).tolist() == [0.0, 1.0, 0.0]
        others = [0, 2]
        for make in (UPGrad, DualProj):
            two = make([1 / 3, 1 / 3])(gram[others][:, others])  # type: ignore[operator]
            torch.testing.assert_close(make()(gram)[others], two, rtol=1e-12, atol=0.0)


def test_pareto_stationary_gradients() -> None:
    grads = Case(3, "stationary").grads
    gram = gram_of(grads)
    lengths = np.linalg.norm(grads, axis=1)
    for name in ("NashMTL", "FairGrad", "FairGrad 2"):
        with pytest.raises(SolverError) as caught:
            MAKE[name]()(gram)
        assert caught.value.status == "near_stationary", name
    for name in ("MGDA", "UPGrad", "DualProj"):
        w = MAKE[name]()(gram).numpy()
        assert np.linalg.norm(w @ grads) <= 1e-7 * (w @ lengths), name


@EVERY
def test_what_is_no_gram_matrix(name: str) -> None:
    if name in ("Constant", "Equal"):
        assert torch.equal(MAKE[name]()(GRAM * torch.nan), MAKE[name]()(GRAM))
        return
    for gram, status in (
        (GRAM * torch.nan, "not_finite"),
        (GRAM + torch.triu(torch.ones(3, 3), 1), "not_symmetric"),
        (-GRAM, "not_psd"),
    ):
        with pytest.raises(SolverError, match=status) as caught:
            MAKE[name]()(gram)
        assert caught.value.status == status
    with pytest.raises(ValueError, match="gram must"):
        MAKE[name]()(GRAM[:2])


def test_weights_that_a_narrow_dtype_cannot_hold() -> None:
    tiny = (1e-12 * GRAM).to(torch.float16)
    tiny.diagonal().fill_(6e-8)
    weights = NashMTL(max_norm=None)(tiny.float())
    assert weights.dtype == torch.float32
    with pytest.raises(SolverError, match=r"do not fit into torch.float16"):
        NashMTL(max_norm=None, preference=[1e9, 1e9, 1e9])(tiny)


@EVERY
def test_copies_pickles_and_prints(name: str) -> None:
    weighting = MAKE[name]()
    weighting(GRAM)
    twins = (copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting)))
    expected = weighting(2 * GRAM)
    for twin in twins:
        assert torch.equal(twin(2 * GRAM), expected)
        assert repr(twin) == repr(weighting)
    rebuilt = eval(repr(weighting), vars(weightings))
    assert repr(rebuilt) == repr(weighting)
    assert torch.equal(rebuilt(GRAM), MAKE[name]()(GRAM))


@EVERY
def test_a_run_resumes_bit_for_bit(name: str) -> None:
    weighting = MAKE[name]()
    rng = np.random.default_rng(0)
    grams = [gram_of(GRADS + 0.05 * rng.normal(size=GRADS.shape)) for _ in range(6)]
    for gram in grams[:3]:
        weighting(gram)
    buffer = io.BytesIO()
    torch.save(weighting.state_dict(), buffer)
    buffer.seek(0)
    resumed = MAKE[name]()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for gram in grams[3:]:
        assert torch.equal(resumed(gram), weighting(gram))
    weighting.reset()
    assert weighting.result is None
    fresh = MAKE[name]()
    for gram in grams:
        assert torch.equal(weighting(gram), fresh(gram))
    with pytest.raises(ValueError, match=r"keeps no state|state must hold"):
        weighting.load_state_dict({"other": 1})


def test_pcgrad_draws_its_orders() -> None:
    weighting = PCGrad(seed=7)
    orders = np.stack([weighting.orders(4) for _ in range(600)])
    for i in range(4):
        others = [j for j in range(4) if j != i]
        assert (np.sort(orders[:, i], axis=1) == others).all()
        # Each of the six orders 100 times, give or take five standard deviations.
        counts = np.unique(orders[:, i], axis=0, return_counts=True)[1]
        assert len(counts) == 6
        assert np.abs(counts - 100).max() < 5 * np.sqrt(600 * 5 / 36)
    assert PCGrad(seed=8)(gram_of(Case(8, "conflicting").grads)).shape == (8,)
    first = [PCGrad(seed=s).orders(8).tolist() for s in (7, 7, 8)]
    assert first[0] == first[1] != first[2]
    assert weighting.orders(1).shape == (1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MGDA("loss-"),
            "normalization must be one of none, l2",
        ),
        (lambda: CAGrad(rescale=3), "rescale must be 0, 1 or 2, got 3"),
        (lambda: CAGrad(-0.1), "c must lie in"),
        (lambda: CAGrad(float("nan")), "c must lie in"),
        (lambda: UPGrad([1.0, -1.0]), "preference must be >= 0"),
        (lambda: DualProj([0.0, 0.0]), "preference must be >= 0, not all of them 0"),
        (lambda: UPGrad([]), "preference must be >= 0"),
        (lambda: NashMTL(-1.0), "max_norm must be finite and >= 0"),
        (lambda: NashMTL(method="nash"), "method must be"),
        (lambda: NashMTL(preference=[1.0, 0.0]), "preference must be positive"),
        (lambda: FairGrad(0.0), "alpha must lie in"),
        (lambda: AlignedMTL("max"), "scale must be"),
        (lambda: PCGrad(-1), "seed must be an integer >= 0"),
        (lambda: PCGrad(1.5), "seed must be an integer >= 0"),  # type: ignore[arg-type]
    ],
)
def test_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
