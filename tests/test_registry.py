"""The table of methods, and what reads it: balancers and weightings by name."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest
import torch

import fastmto
from fastmto import balancers, methods, weightings
from fastmto.balancers import gram_methods
from fastmto.balancers.registry import method

# fmt: off
KEYS = [
    "ls", "si", "rlw", "dwa", "uncertainty", "banditmtl", "imtl_l", "gradnorm", "famo", "ldc_mtl",
    "mgda", "mgda_ub", "pcgrad", "graddrop", "cagrad", "imtl_g", "imtl", "nashmtl", "upgrad",
    "dualproj", "fairgrad", "aligned_mtl", "db_mtl", "pub", "marigold",
]
# fmt: on
GRAM_METHODS = {getattr(balancers, x).key: getattr(balancers, x) for x in gram_methods.__all__}
every_gram_method = pytest.mark.parametrize("key", GRAM_METHODS)


def test_every_method_is_there_once():
    assert fastmto.available() == KEYS
    for key in KEYS:
        balancer = fastmto.get(key, n_tasks=3)
        assert isinstance(balancer, balancers.Balancer)
        assert balancer.key == key
        assert balancer.n_tasks == 3
        name = methods.find(key).name
        assert getattr(balancers, name) is type(balancer)
        assert name in balancers.__all__


def test_the_table_is_of_one_mind():
    names = [methods._plain(n) for row in methods.TABLE for n in (row.key, *row.aliases)]
    assert len(names) == len(set(names))
    for row in methods.TABLE:
        assert row.level in ("loss", "gradient", "update", "direction")
        assert row.name or row.weighting
        if row.weighting:
            kind = getattr(weightings, row.weighting)
            assert row.weighting in weightings.__all__
            assert type(weightings.as_weighting(row.key)) is kind
        if row.name:
            by_losses = issubclass(getattr(balancers, row.name), balancers.LossBalancer)
            assert by_losses == (row.level == "loss")


def test_the_table_needs_no_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('methods', {methods.__file__!r})\n"
        "table = sys.modules['methods'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(table)\n"
        "assert 'nashmtl' in table.available() and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("spelling", "key"),
    [
        ("UW", "uncertainty"),
        ("EW", "ls"),
        ("scaleinvls", "si"),
        ("Nash_MTL", "nashmtl"),
        ("Nash-MTL", "nashmtl"),
        ("DB_MTL", "db_mtl"),
        ("Aligned_MTL", "aligned_mtl"),
        ("AlignedMTL", "aligned_mtl"),
        ("IMTL-G", "imtl_g"),
        ("IMTLL", "imtl_l"),
        ("MGDA-UB", "mgda_ub"),
        ("UPGrad", "upgrad"),
        ("Random", "rlw"),
        ("LDC-MTL", "ldc_mtl"),
    ],
)
def test_other_spellings(spelling, key):
    assert method(spelling).key == key


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"name must be one of ls, si, .*, got 'adam'"):
        fastmto.get("adam")
    with pytest.raises(ValueError, match=r"name must be one of ls, .*, got 'bargaining'"):
        fastmto.get("bargaining")
    with pytest.raises(ValueError, match="name must be a string, got 3"):
        fastmto.get(3)
    with pytest.raises(TypeError, match="momentum"):
        fastmto.get("cagrad", momentum=0.9)


@every_gram_method
def test_a_gram_method_tells_its_arguments(key):
    cls = GRAM_METHODS[key]
    signature = inspect.signature(cls).parameters
    assert next(iter(signature)) == "n_tasks"
    own = inspect.signature(type(cls().weighting)).parameters
    shared = inspect.signature(balancers.GradientBalancer).parameters
    assert list(signature) == ["n_tasks", *own, *list(shared)[1:]]
    for name, parameter in own.items():
        assert signature[name].default == parameter.default
        assert signature[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"{name}:" in cls.__doc__ or f"{name}," in cls.__doc__
    assert cls.__doc__.startswith(f"{cls.__name__}: {methods.find(key).what}.\n")
    for part in ("Source", "Args:", "Example:", f"balancers.{cls.__name__}("):
        assert part in cls.__doc__


@every_gram_method
def test_a_gram_method_can_be_pickled_and_inherited(key):
    cls = GRAM_METHODS[key]
    twin = pickle.loads(pickle.dumps(cls(3, update_weights_every=2)))
    assert type(twin) is cls
    assert twin.update_weights_every == 2
    assert isinstance(twin, balancers.GramBalancer)

    class Mine(cls):
        def __init__(self, every: int) -> None:
            super().__init__(3, update_weights_every=every)

    mine = Mine(4)
    assert (mine.key, mine.n_tasks, mine.update_weights_every) == (key, 3, 4)
    assert list(inspect.signature(Mine).parameters) == ["every"]
    for name in inspect.signature(type(mine.weighting)).parameters:
        assert getattr(mine, name) is getattr(mine.weighting, name)


def test_an_attribute_is_the_weightings():
    balancer = balancers.NashMTL(max_norm=0.5)
    balancer.weighting.max_norm = 0.25
    assert balancer.max_norm == 0.25
    with pytest.raises(ValueError, match="level must be 'features', got 'parameters'"):
        balancers.MGDAUB(level="parameters")


def test_a_user_s_eps_goes_before_that_of_the_gradients():
    rows = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1e-3, 1e-3], [1.0, 1e-3, 1.001]])
    x = torch.nn.Parameter(torch.zeros(3))
    found = []
    for eps in (None, 0.1):
        balancer = fastmto.get("aligned_mtl", eps=eps)
        balancer.backward(list(rows @ x), [x], [])
        found.append(balancer.weights.clone())
        assert balancer.eps == eps
    assert not torch.allclose(*found)


G = torch.tensor([[9.0, -3.0, 1.0], [-3.0, 4.0, -2.0], [1.0, -2.0, 16.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("bargaining", weightings.Bargaining()),
        ("ccp", weightings.Bargaining("ccp")),
        ("Nash_MTL", weightings.NashMTL()),
        ("equal", weightings.Equal()),
        ("IMTL-G", weightings.IMTLG()),
    ],
)
def test_weightings_by_name(name, same):
    weighting = weightings.as_weighting(name)
    assert repr(weighting) == repr(same)
    assert torch.equal(weighting(G), same(G))
    assert weightings.as_weighting(weighting) is weighting


def test_options_of_a_name():
    assert weightings.as_weighting("cagrad", c=0.1).c == 0.1
    with pytest.raises(ValueError, match="criterion must be a name with c, got"):
        weightings.as_weighting(weightings.CAGrad(), "criterion", c=0.1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mgdaa", "weighting must be one of bargaining, ccp, .*nashmtl.*, got 'mgdaa'"),
        ("famo", "weighting must be one of .*, got 'famo'"),
        (3, r"weighting must be a fastmto.weightings.Weighting.* a callable .* got 3"),
        (weightings.CAGrad, "weighting must be a fastmto.weightings.Weighting, .*CAGrad"),
        (weightings.MGDA("loss"), "weighting must not need the losses, got MGDA"),
    ],
)
def test_what_is_no_weighting(value, message):
    with pytest.raises(ValueError, match=message):
        weightings.as_weighting(value)


@pytest.mark.parametrize("kind", [torch.tensor, list, tuple, lambda x: torch.tensor(x).numpy()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_is_a_weighting(kind, dtype):
    given = []

    def function(gram):
        given.append(gram.clone())
        gram.zero_()
        return kind([1.0, 2.0, 0.5])

    gram = G.to(dtype)
    weighting = weightings.as_weighting(function)
    weights = weighting(gram, [0, 2, 5])
    assert weights.dtype == dtype
    assert weights.tolist() == [1.0, 2.0, 0.5]
    assert torch.equal(gram, given[0])
    assert torch.equal(gram, G.to(dtype))
    assert (weighting.device_solver(3), weighting.positive, weighting.state_dict()) == (
        None,
        False,
        {},
    )
    weighting.load_state_dict({})
    weighting.reset()
    assert torch.equal(weighting.hold(gram, weights), weights)


def test_the_weights_of_a_function_are_its_own():
    kept = torch.ones(3, dtype=torch.float64, requires_grad=True)
    weights = weightings.as_weighting(lambda gram: kept)(G)
    assert not weights.requires_grad
    weights.zero_()
    assert kept.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "criterion must return weights, got NoneType"),
        ("abc", "criterion must return weights, got str"),
        ([1.0, 2.0], r"criterion must return weights of shape \(3,\), got \(2,\)"),
        (torch.ones(3, 1), r"criterion must return weights of shape \(3,\), got \(3, 1\)"),
        ([None, 1, 2], "criterion must return numbers"),
        (torch.ones(3, dtype=torch.complex64), "criterion must return real numbers, got .*complex"),
    ],
)
def test_what_a_function_may_not_return(found, message):
    with pytest.raises(ValueError, match=message):
        weightings.as_weighting(lambda gram: found, "criterion")(G)


def test_weights_of_a_function_that_are_not_finite():
    weighting = weightings.as_weighting(lambda gram: [1.0, float("nan"), 1.0])
    with pytest.raises(fastmto.errors.SolverError, match="not finite") as caught:
        weighting(G)
    assert caught.value.status == "not_finite"


def test_mgda_by_the_losses():
    losses = torch.tensor([4.0, 0.5, 2.0], dtype=torch.float64)
    lengths = G.diagonal().sqrt()
    for normalization, divisor in (("loss", losses), ("loss+", losses * lengths)):
        weighting = weightings.MGDA(normalization)
        weights = weighting(G, losses=losses)
        w = weights.numpy()
        normalised = (G / divisor[:, None] / divisor).numpy()
        # The shortest vector of the hull: no gradient is shorter along it.
        assert (normalised @ w >= w @ normalised @ w * (1 - 1e-12)).all()
        assert w.sum() == pytest.approx(1)
        for bad in (None, losses[:2], torch.tensor([1.0, -1.0, 1.0])):
            with pytest.raises(ValueError, match="losses must be 3 positive numbers"):
                weighting(G, losses=bad)
