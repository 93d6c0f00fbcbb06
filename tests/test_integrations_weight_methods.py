"""`WeightMethods` in loops of the shape that the nash-mtl and FAMO trainers have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmto
from fastmto.errors import SolverError
from fastmto.integrations.weight_methods import METHODS, WeightMethods

#: What those repositories call them.
FAMILY = {
    *("stl", "ls", "uw", "scaleinvls", "rlw", "dwa", "famo", "pcgrad", "graddrop", "mgda"),
    *("log_mgda", "cagrad", "log_cagrad", "imtl", "log_imtl", "nashmtl", "fairgrad"),
}
#: What their command lines pass.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nashmtl": {"update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0},
    "stl": {"main_task": 1},
    "dwa": {"temp": 2.0},
    "cagrad": {"c": 0.4, "max_norm": 1.0},
    "log_cagrad": {"c": 0.4, "max_norm": 1.0},
    "famo": {"gamma": 0.01, "w_lr": 0.025, "max_norm": 1.0},
    "marigold": {"estimator": "reuse"},
}


class Model(nn.Module):
    def __init__(self, n_tasks: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.last = nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(n_tasks))

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.body.parameters()
        yield from self.last.parameters()

    def task_specific_parameters(self) -> Iterator[nn.Parameter]:
        return self.heads.parameters()

    def last_shared_parameters(self) -> Iterator[nn.Parameter]:
        return self.last.parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.last(self.body(x)).tanh()
        return torch.cat([head(features) for head in self.heads], dim=1), features


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


def batch(step: int, n_tasks: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, generator=generator)
    signs = torch.tensor([1.0, -2.0, 3.0])[:n_tasks]
    return x, x.sum(dim=1, keepdim=True).sin() * signs + signs.cumsum(0)


def mse(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(out, y, reduction="none").mean(0)


def tensors(model: Model, features: Tensor) -> dict[str, Any]:
    return {
        "shared_parameters": list(model.shared_parameters()),
        "task_specific_parameters": list(model.task_specific_parameters()),
        "last_shared_parameters": list(model.last_shared_parameters()),
        "representation": features,
    }


def train(model: Model, weight_method: WeightMethods, updates: bool, steps: int = 4) -> list[Any]:
    """The loop of the quantum chemistry trainers."""
    optimizer = torch.optim.Adam(
        [
            {"params": model.parameters(), "lr": 1e-3},
            {"params": weight_method.parameters(), "lr": 0.025},
        ],
    )
    outputs = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        out, features = model(x)
        losses = mse(out, y)
        outputs.append(weight_method.backward(losses=losses, **tensors(model, features)))
        optimizer.step()
        if updates:
            with torch.no_grad():
                weight_method.method.update(mse(model(x)[0], y).detach())
    return outputs


@pytest.mark.parametrize("name", METHODS)
def test_trains(name: str) -> None:
    torch.manual_seed(0)
    model = Model()
    before = copy.deepcopy(model)
    weight_method = WeightMethods(
        name, n_tasks=3, device=torch.device("cpu"), **ARGUMENTS.get(name, {})
    )
    outputs = train(model, weight_method, name in ("famo", "marigold"))
    moved = [
        float((p - q).detach().abs().max()) > 0
        for p, q in zip(model.shared_parameters(), before.shared_parameters(), strict=True)
    ]
    assert all(moved)
    for loss, extra in outputs:
        assert np.isfinite(loss.item())
        assert all(np.isfinite(w.item()) for w in extra["weights"])
        assert len(extra["weights"]) == 3
    assert weight_method.method.balancer.stats["steps"] == 4


def test_names() -> None:
    assert set(METHODS) >= FAMILY
    assert set(METHODS) >= set(fastmto.available())


class Step:
    """One backward of a method beside the gradients that it starts from."""

    def __init__(self, name: str, logarithms: bool = False, **arguments: Any) -> None:
        torch.manual_seed(0)
        model = Model()
        x, y = batch(0)
        out, features = model(x)
        losses = mse(out, y)
        shared = list(model.shared_parameters())
        heads = list(model.task_specific_parameters())
        objectives = losses.log() if logarithms else losses
        rows, own = [], []
        for i, objective in enumerate(objectives):
            grads = torch.autograd.grad(
                objective, [*shared, *heads[2 * i : 2 * i + 2]], retain_graph=True
            )
            rows.append(torch.cat([g.flatten() for g in grads[: len(shared)]]))
            own.append(torch.cat([g.flatten() for g in grads[len(shared) :]]))
        self.losses = losses.detach()
        self.objectives = objectives.detach()
        self.jacobian = torch.stack(rows)
        self.gram = self.jacobian @ self.jacobian.T
        self.own = torch.stack(own)
        self.method = WeightMethods(name, 3, "cpu", **arguments)
        self.loss, self.extra = self.method.backward(losses=losses, **tensors(model, features))
        self.weights = self.extra["weights"].double()
        self.shared = torch.cat([p.grad.flatten() for p in shared])
        self.heads = torch.stack(
            [torch.cat([p.grad.flatten() for p in heads[2 * i : 2 * i + 2]]) for i in range(3)]
        )

    def holds(self, heads: str = "weighted", clip: float | None = None) -> None:
        """The gradients are those of the weights."""
        joint = self.weights @ self.jacobian
        if clip is not None:
            assert float(joint.norm()) > clip
            joint = joint * clip / joint.norm()
        torch.testing.assert_close(self.shared, joint, rtol=1e-5, atol=1e-10)
        expected = self.own * self.weights[:, None] if heads == "weighted" else self.own
        torch.testing.assert_close(self.heads, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(self.loss.double(), self.weights @ self.objectives)


@pytest.mark.parametrize("max_norm", [0.0, 0.3])
def test_nashmtl(max_norm: float) -> None:
    """The bargaining solution, unclipped for the heads."""
    step = Step("nashmtl", max_norm=max_norm)
    torch.testing.assert_close(step.weights * (step.gram @ step.weights), torch.ones(3))
    step.holds(clip=max_norm or None)
    np.testing.assert_allclose(step.extra["GTG"], step.gram)


def test_imtl() -> None:
    for name, logarithms in (("imtl", False), ("log_imtl", True)):
        step = Step(name, logarithms)
        projections = (step.gram @ step.weights) / step.gram.diagonal().sqrt()
        torch.testing.assert_close(projections, projections[:1].expand(3))
        assert float(step.weights.sum()) == pytest.approx(1)
        step.holds()


@pytest.mark.parametrize(
    ("normalization", "own"),
    [("none", "none"), ("norm", "l2"), ("loss", "loss"), ("loss+", "loss+")],
)
def test_mgda(normalization: str, own: str) -> None:
    """T times the min-norm weights of the normalised gradients, on the gradients as they are."""
    step = Step("mgda", normalization=normalization)
    lengths = {
        "none": torch.ones(3),
        "l2": step.gram.diagonal().sqrt(),
        "loss": step.losses,
        "loss+": step.losses * step.gram.diagonal().sqrt(),
    }[own]
    gram = step.gram / lengths[:, None] / lengths
    w = step.weights / 3
    assert float(w.sum()) == pytest.approx(1)
    slopes = gram @ w
    assert float(slopes.min()) >= float(w @ slopes) * (1 - 1e-9)  # optimality on the simplex
    step.holds()


def test_mgda_at_the_representation() -> None:
    step = Step("mgda", params="rep")
    assert float(step.weights.sum()) == pytest.approx(3)
    step.holds()


def test_log_mgda() -> None:
    step = Step("log_mgda", logarithms=True)
    w = step.weights / step.weights.sum()
    torch.testing.assert_close(step.weights, w / (w / step.losses).sum())
    slopes = step.gram @ w
    assert float(slopes.min()) >= float(w @ slopes) * (1 - 1e-9)
    step.holds()


@pytest.mark.parametrize(
    ("name", "max_norm"), [("cagrad", 0.0), ("cagrad", 0.2), ("log_cagrad", 0.2)]
)
def test_cagrad(name: str, max_norm: float) -> None:
    """T times the rescaled direction, which is c ||g0|| away from g0; the heads on their own."""
    step = Step(name, name.startswith("log"), c=0.4, max_norm=max_norm)
    step.holds(heads="own", clip=max_norm or None)
    mean = step.jacobian.mean(dim=0)
    direction = (step.weights @ step.jacobian) / 3 * (1 + 0.4**2)
    assert float((direction - mean).norm()) == pytest.approx(0.4 * float(mean.norm()))
    assert float((step.jacobian @ direction).min()) >= float((step.jacobian @ mean).min())


def test_fairgrad() -> None:
    step = Step("fairgrad", alpha=2.0, max_norm=0.4)
    a = step.weights / 3
    torch.testing.assert_close(step.gram @ a, a**-0.5)
    step.holds(heads="own", clip=0.4)


def test_pcgrad_and_graddrop_leave_the_heads_alone() -> None:
    step = Step("pcgrad")
    step.holds(heads="own")
    step = Step("graddrop", max_norm=0.0)
    torch.testing.assert_close(step.heads, step.own)
    kept = torch.stack([step.jacobian.clamp(min=0).sum(0), step.jacobian.clamp(max=0).sum(0)])
    assert float((step.shared - kept).abs().amin(dim=0).max()) <= 1e-12


def test_loss_level() -> None:
    step = Step("ls")
    assert torch.equal(step.weights, torch.ones(3))
    step.holds()
    step = Step("stl", main_task=2)
    assert step.weights.tolist() == [0, 0, 1]
    step = Step("scaleinvls")
    torch.testing.assert_close(step.weights, 1 / step.losses)
    step.holds()
    step = Step("rlw")
    assert float(step.weights.sum()) == pytest.approx(1)
    step.holds()
    step = Step("dwa", iteration_window=10)
    torch.testing.assert_close(step.weights, torch.ones(3) / 3)
    step.holds()


def test_uncertainty_is_learnt_by_the_trainers_optimizer() -> None:
    step = Step("uw")
    torch.testing.assert_close(step.weights, torch.full((3,), 0.5))
    step.holds()
    logsigma = step.method.parameters()
    grads = torch.stack([p.grad for p in logsigma])
    torch.testing.assert_close(grads, 0.5 * (1 - step.losses))


def published_famo(
    losses: list[tuple[Tensor, Tensor]], low: Tensor, lr: float, gamma: float
) -> Any:
    """FAMO's Algorithm 1 as that repository computes it: weights from (before, after) pairs."""
    logits = torch.zeros(len(low), requires_grad=True)
    adam = torch.optim.Adam([logits], lr=lr, weight_decay=gamma)
    for before, after in losses:
        z = logits.softmax(-1)
        distance = before - low + 1e-8
        weights = z.detach() / distance / (z.detach() / distance).sum()
        yield weights
        delta = distance.log() - (after - low + 1e-8).log()
        adam.zero_grad()
        z.backward(delta)
        adam.step()


def test_famo() -> None:
    pairs = [(3 * torch.rand(3) - 1, 3 * torch.rand(3) - 1) for _ in range(6)]
    low = torch.full((3,), -1.5)
    weight_method = WeightMethods("famo", n_tasks=3, device="cpu", gamma=0.01, w_lr=0.1)
    weight_method.method.set_min_losses(low)
    x = torch.zeros(3, requires_grad=True)
    for (before, after), weights in zip(
        pairs, published_famo(pairs, low, lr=0.1, gamma=0.01), strict=True
    ):
        _, extra = weight_method.backward(losses=x + before, shared_parameters=[x])
        with torch.no_grad():
            weight_method.method.update(after)
        torch.testing.assert_close(extra["weights"], weights, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="before the first backward"):
        weight_method.method.set_min_losses(low)


@pytest.mark.parametrize("name", ["nashmtl", "cagrad", "mgda", "pcgrad", "ls", "famo"])
def test_toy_loop(name: str) -> None:
    """The toy trainer: one tensor is all there is to share, the rest is None."""
    x = torch.tensor([-3.0, 2.0], requires_grad=True)
    target = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
    method = WeightMethods(method=name, device=torch.device("cpu"), n_tasks=2)
    if "famo" in name:
        method.method.set_min_losses(torch.tensor([-0.1, -0.1]))
    optimizer = torch.optim.Adam(
        [{"params": [x], "lr": 1e-1}, {"params": method.parameters(), "lr": 0.025}]
    )
    values = []
    for it in range(30):
        optimizer.zero_grad()
        f = (x - target).pow(2).sum(dim=1)
        values.append(f.detach())
        if "famo" in name and it > 0:
            with torch.no_grad():
                method.method.update(f)
        method.backward(
            losses=f,
            shared_parameters=(x,),
            task_specific_parameters=None,
            last_shared_parameters=None,
            representation=None,
        )
        optimizer.step()
    assert bool((values[-1] < values[0]).all())


def test_heads_that_are_not_named_learn_too() -> None:
    """Trainers without task_specific_parameters rely on `loss.backward()` reaching the heads."""
    model = Model()
    x, y = batch(0)
    WeightMethods("nashmtl", 3, "cpu").backward(
        losses=mse(model(x)[0], y), shared_parameters=list(model.shared_parameters())
    )
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["famo", "pcgrad", "nashmtl", "uw", "log_mgda"])
def test_state(name: str) -> None:
    torch.manual_seed(0)
    model = Model()
    weight_method = WeightMethods(name, n_tasks=3, device="cpu")
    train(model, weight_method, name == "famo")
    other, resumed = copy.deepcopy(model), WeightMethods(name, n_tasks=3, device="cpu")
    resumed.load_state_dict(copy.deepcopy(weight_method.state_dict()))
    outputs = [train(m, w, name == "famo") for m, w in ((model, weight_method), (other, resumed))]
    for (_, a), (_, b) in zip(*outputs, strict=True):
        assert torch.equal(a["weights"], b["weights"])
    copied = copy.deepcopy(weight_method)
    assert copied.method.balancer is not weight_method.method.balancer


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="method must be one of stl, ls"):
        WeightMethods("nothing", n_tasks=2, device="cpu")
    with pytest.raises(ValueError, match="main_task"):
        WeightMethods("stl", n_tasks=2, device="cpu", main_task=2)
    with pytest.raises(ValueError, match="params must be one of shared, rep, got 'last'"):
        WeightMethods("mgda", n_tasks=2, device="cpu", params="last")
    with pytest.raises(ValueError, match="max_norm"):
        WeightMethods("cagrad", n_tasks=2, device="cpu", max_norm=-1.0)
    with pytest.raises(TypeError, match="c"):
        WeightMethods("ls", n_tasks=2, device="cpu", c=1.0)
    with pytest.raises(TypeError, match="takes no losses after the step"):
        WeightMethods("ls", n_tasks=2, device="cpu").method.update(torch.ones(2))


def test_no_weights_follow_the_balancers_policy() -> None:
    x = torch.ones(2, requires_grad=True)
    opposed = [x[0] + 2, 2 - x[0]]
    with pytest.warns(RuntimeWarning, match="weights held"):
        _, extra = WeightMethods("nashmtl", 2, "cpu").backward(
            losses=opposed, shared_parameters=[x]
        )
    assert extra["info"].status != "solved"
    with pytest.raises(SolverError):
        WeightMethods("nashmtl", 2, "cpu", on_failure="raise").backward(
            losses=[x[0] + 2, 2 - x[0]], shared_parameters=[x]
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["nashmtl", "log_mgda", "uw", "famo", "graddrop"])
def test_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    model = Model()
    outputs = []
    for device in ("cpu", "cuda"):
        weight_method = WeightMethods(name, n_tasks=3, device=torch.device(device))
        copied = copy.deepcopy(model).to(device)
        x, y = (tensor.to(device) for tensor in batch(0))
        out, features = copied(x)
        outputs.append(weight_method.backward(losses=mse(out, y), **tensors(copied, features)))
        assert all(p.grad is not None for p in copied.parameters())
        assert all(p.device.type == device for p in weight_method.parameters())
    (cpu_loss, cpu), (gpu_loss, gpu) = outputs
    torch.testing.assert_close(gpu["weights"].cpu().double(), cpu["weights"].double())
    torch.testing.assert_close(gpu_loss.cpu(), cpu_loss)


def test_logarithms_need_positive_losses() -> None:
    name = next(name for name in METHODS if name.startswith("log_"))
    x = torch.nn.Parameter(torch.ones(2))
    method = WeightMethods(name, n_tasks=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"losses\[1\] must be positive: its logarithm is taken"):
        method.backward(losses=torch.stack([x.sum(), -x.sum()]), shared_parameters=[x])
    assert x.grad is None


def test_a_skipped_step_does_not_clip_what_was_there() -> None:
    x = torch.nn.Parameter(torch.ones(2))
    x.grad = torch.full((2,), 100.0)
    method = WeightMethods("nashmtl", n_tasks=2, device=torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match="step skipped"):
        method.backward(losses=torch.stack([x.sum(), x.sum() * torch.nan]), shared_parameters=[x])
    assert x.grad.tolist() == [100.0, 100.0]
