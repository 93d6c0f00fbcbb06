"""TorchJD's loops with our weightings in them, beside TorchJD's own."""

from __future__ import annotations

import copy
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from fastmto import weightings
from fastmto.errors import SolverError

# TorchJD's methods call solvers that warn in many ways: none of that is ours to test.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ours() -> Any:
    peers.torchjd()
    return importlib.import_module("fastmto.integrations.torchjd")


def theirs(name: str, *args: Any, **options: Any) -> Any:
    """TorchJD's aggregator."""
    aggregation = importlib.import_module("torchjd.aggregation")
    return getattr(aggregation, name)(*args, **options)


def plain_projector() -> Any:
    """TorchJD's projector without its regularization: it moves the answer."""
    return importlib.import_module("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=0.0)


#: Our weighting, TorchJD's aggregator of the same convention, largest relative difference (what
#: TorchJD's solver is stopped at), largest T at which its solver is exact.
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[int], Any], float, int]] = {
    "equal": (weightings.Equal, lambda n: theirs("Sum"), 1e-12, 8),
    "mgda": (lambda: weightings.MGDA(), lambda n: theirs("MGDA"), 1e-9, 2),
    "mgda_many": (
        lambda: weightings.MGDA(),
        lambda n: theirs("MGDA", epsilon=1e-9, max_iters=20000),
        1e-3,
        8,
    ),
    "cagrad": (
        lambda: weightings.CAGrad(c=0.4, rescale=0),
        lambda n: theirs("CAGrad", c=0.4, norm_eps=0.0),
        1e-3,
        8,
    ),
    "imtl_g": (lambda: weightings.IMTLG(), lambda n: theirs("IMTLG"), 1e-9, 8),
    "upgrad": (
        lambda: weightings.UPGrad(),
        lambda n: theirs("UPGrad", projector=plain_projector()),
        1e-9,
        8,
    ),
    "dualproj": (
        lambda: weightings.DualProj(),
        lambda n: theirs("DualProj", projector=plain_projector()),
        1e-9,
        8,
    ),
    "nashmtl": (
        lambda: weightings.NashMTL(),
        lambda n: theirs("NashMTL", n_tasks=n),
        1e-6,
        5,
    ),
    "fairgrad": (
        lambda: weightings.FairGrad(alpha=2.0),
        lambda n: theirs("FairGrad", alpha=2.0),
        1e-6,
        8,
    ),
    "aligned_mtl": (lambda: weightings.AlignedMTL(), lambda n: theirs("AlignedMTL"), 1e-9, 8),
    "aligned_mtl_median": (
        lambda: weightings.AlignedMTL("median"),
        lambda n: theirs("AlignedMTL", scale_mode="median"),
        1e-9,
        8,
    ),
    "aligned_mtl_rmse": (
        lambda: weightings.AlignedMTL("rmse"),
        lambda n: theirs("AlignedMTL", scale_mode="rmse"),
        1e-9,
        8,
    ),
    "pcgrad": (lambda: weightings.PCGrad(), lambda n: theirs("PCGrad"), 1e-12, 2),
}


def jacobian(n_tasks: int, seed: int = 0, spread: float = 0.5) -> Tensor:
    """(T, 40) with lengths 1 to a few and conflicts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_tasks, 40, generator=generator, dtype=torch.float64)
    common = torch.randn(40, generator=generator, dtype=torch.float64)
    lengths = torch.exp(spread * torch.randn(n_tasks, 1, generator=generator, dtype=torch.float64))
    return (rows - 0.4 * common) * lengths / 4


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("n_tasks", [2, 3, 8])
def test_aggregators_agree(ours: Any, name: str, n_tasks: int) -> None:
    make, make_theirs, rtol, most = PAIRS[name]
    if n_tasks > most:
        n_tasks = 2
    for seed in range(3):
        matrix = jacobian(n_tasks, seed)
        expected = make_theirs(n_tasks)(matrix)
        got = ours.Aggregator(make())(matrix)
        assert float((got - expected).norm() / expected.norm()) <= rtol


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sum(dim=1, keepdim=True).sin(), -2 * x[:, :1]])
    return x, y


def train(net: Net, aggregator: Any, **options: Any) -> list[Tensor]:
    """A loop as in TorchJD's documentation; returns what it says the weights were."""
    autojac = importlib.import_module("torchjd.autojac")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weights = []
    for step in range(5):
        x, targets = data(step)
        features = net.trunk(x)
        losses = [
            nn.functional.mse_loss(head(features), target)
            for head, target in zip(net.heads, targets, strict=True)
        ]
        autojac.mtl_backward(losses, features=features)
        weights.append(autojac.jac_to_grad(net.trunk.parameters(), aggregator, **options))
        optimizer.step()
        optimizer.zero_grad()
    return weights


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((p - q).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", [name for name in PAIRS if name != "mgda_many"])
def test_swapped_into_a_jacobian_loop(ours: Any, name: str, optimized: bool) -> None:
    make, make_theirs, rtol, _ = PAIRS[name]
    torch.manual_seed(0)
    net = Net().double()
    before, reference = copy.deepcopy(net), copy.deepcopy(net)
    weights = train(net, ours.Aggregator(make()), optimize_gramian_computation=optimized)
    train(reference, make_theirs(2))
    assert all(w.shape == (2,) and w.dtype == torch.float64 for w in weights)
    assert distance(net, before) > 0.05
    assert distance(net, reference) <= 10 * rtol


@pytest.mark.parametrize("name", ["upgrad", "imtl_g"])
def test_swapped_into_an_autogram_loop(ours: Any, name: str) -> None:
    """`Engine` and a weighting, against `backward` and an aggregator of TorchJD's."""
    autojac = importlib.import_module("torchjd.autojac")
    engines = importlib.import_module("torchjd.autogram")
    make, make_theirs, _, _ = PAIRS[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    reference = copy.deepcopy(net)
    engine, weighting = engines.Engine(net, batch_dim=0), ours.Weighting(make())
    aggregator = make_theirs(4)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, reference)]
    for step in range(3):
        x, y = data(step)
        x, y = x[:4], y[0, :4]
        losses = (net(x) - y).pow(2).squeeze(1)
        losses.backward(weighting(engine.compute_gramian(losses)))
        autojac.backward((reference(x) - y).pow(2).squeeze(1))
        autojac.jac_to_grad(reference.parameters(), aggregator)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert distance(net, reference) <= 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5,), (5, 5), (2, 3, 5)])
def test_projector(ours: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = jacobian(5, 3)
    gram = (matrix @ matrix.T).to(dtype)
    references = torch.rand(shape, dtype=torch.float64).to(dtype)
    weights = ours.Projector()(references, gram)
    assert weights.shape == shape
    assert weights.dtype == dtype
    expected = plain_projector()(references.double(), gram.double())
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_projector_in_their_methods(ours: Any, name: str) -> None:
    """TorchJD's own method with our solver; theirs is off by what it adds to the diagonal."""
    matrix = jacobian(4, 1)
    ours_in_theirs = theirs(name, projector=ours.Projector())(matrix)
    exact = ours.Aggregator(getattr(weightings, name)())(matrix)
    regularized = theirs(name)(matrix)
    torch.testing.assert_close(ours_in_theirs, exact, rtol=1e-12, atol=1e-12)
    assert 0 < float((regularized - exact).norm() / exact.norm()) < 1e-2
    assert float((matrix @ exact).min()) >= -1e-12


def test_dtype_and_graph(ours: Any) -> None:
    matrix = jacobian(3).float().requires_grad_()
    weighting = ours.Weighting(weightings.MGDA())
    weights = weighting(matrix @ matrix.T)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert weighting.weighting.result.status == "solved"


def test_state_is_part_of_state_dict(ours: Any) -> None:
    """PCGrad's generator goes on where it was, through a file."""
    gram = jacobian(6, 2) @ jacobian(6, 2).T
    aggregator = ours.Aggregator(weightings.PCGrad(seed=3))
    aggregator(jacobian(6))
    file = io.BytesIO()
    torch.save(aggregator.state_dict(), file)
    expected = [aggregator.gramian_weighting(gram) for _ in range(3)]
    file.seek(0)
    restored = ours.Aggregator(weightings.PCGrad(seed=0))
    restored.load_state_dict(torch.load(file))
    for weights in expected:
        assert torch.equal(restored.gramian_weighting(gram), weights)
    aggregator.reset()
    fresh = ours.Aggregator(weightings.PCGrad(seed=3))
    assert torch.equal(aggregator.gramian_weighting(gram), fresh.gramian_weighting(gram))


def test_no_weights_is_an_error_with_a_status(ours: Any) -> None:
    opposed = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    with pytest.raises(SolverError, match="NashMTL") as caught:
        ours.Aggregator(weightings.NashMTL())(opposed)
    assert caught.value.status != "solved"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(ours: Any) -> None:
    matrix = jacobian(4)
    on_gpu = ours.Aggregator(weightings.UPGrad())(matrix.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), ours.Aggregator(weightings.UPGrad())(matrix))
    weights = ours.Projector()(torch.eye(4).cuda(), (matrix @ matrix.T).cuda())
    assert weights.is_cuda


def test_what_is_no_weighting_is_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match=r"weighting must be a fastmto.weightings.Weighting"):
        ours.Aggregator(weightings.MGDA)


def test_names(ours: Any) -> None:
    assert str(ours.Aggregator(weightings.UPGrad())) == "UPGrad"
    assert "CAGrad" in repr(ours.Weighting(weightings.CAGrad()))
    assert repr(ours.Aggregator(weightings.Equal())) == f"Aggregator({weightings.Equal()!r})"


def test_documented_example(ours: Any) -> None:
    block = peers.documented("fastmto.integrations.torchjd")
    exec(compile(block, "<documentation>", "exec"), {"__name__": "__main__"})


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.delitem(sys.modules, "fastmto.integrations.torchjd", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fastmto\[torchjd\]'"):
        importlib.import_module("fastmto.integrations.torchjd")


def test_fastmto_alone_imports_no_peer() -> None:
    code = (
        "import sys, fastmto, fastmto.integrations, fastmto.integrations.weight_methods; "
        "assert not {'torchjd', 'LibMTL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
