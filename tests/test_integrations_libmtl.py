"""LibMTL's Trainer with our balancers in it, beside LibMTL's own weightings."""

from __future__ import annotations

import copy
import importlib
import io
import sys
from typing import Any

import numpy as np
import peers
import pytest
import torch
from torch import Tensor, nn

import fastmto

TASKS = ("a", "b", "c")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bench:
    """LibMTL on a CPU and today's torch, in float64."""

    def __init__(self, library: Any, tasks: tuple[str, ...] = TASKS) -> None:
        self.library = library
        self.ours = importlib.import_module("fastmto.integrations.libmtl")
        self.tasks = tasks
        torch.manual_seed(0)
        x = torch.randn(24, 4)
        noise = 0.1 * torch.randn(24, 1)
        full = {
            "a": x.sum(dim=1, keepdim=True).sin() + noise,
            "b": -3 * x[:, :1] + noise,
            "c": (x[:, 1:2] * x[:, 2:3]) - noise,
        }
        self.loader = peers.Loader(
            [
                (x[i : i + 8], {task: full[task][i : i + 8].clone() for task in tasks})
                for i in range(0, 24, 8)
            ]
        )

    def task(self) -> dict[str, Any]:
        loss = importlib.import_module("LibMTL.loss")
        metrics = importlib.import_module("LibMTL.metrics")

        class Squared(loss.AbsLoss):
            def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
                return nn.functional.mse_loss(pred, gt)

        class Error(metrics.AbsMetric):
            def update_fun(self, pred: Tensor, gt: Tensor) -> None:
                self.record.append(float((pred - gt).abs().sum()))
                self.bs.append(len(pred))

            def score_fun(self) -> list[float]:
                return [sum(self.record) / sum(self.bs)]

        return {"metrics": ["mae"], "metrics_fn": Error(), "loss_fn": Squared(), "weight": [0]}

    def trainer(
        self,
        weighting: Any,
        rep_grad: bool = False,
        experts: int = 0,
        multi_input: bool = False,
        **weight_args: Any,
    ) -> Any:
        """One encoder, or several with a gate for every task."""
        torch.manual_seed(1)
        architectures = self.library.architecture
        return self.library.Trainer(
            task_dict={task: self.task() for task in self.tasks},
            weighting=weighting,
            architecture=architectures.MMoE if experts else architectures.HPS,
            encoder_class=Encoder,
            decoders=nn.ModuleDict({task: nn.Linear(5, 1) for task in self.tasks}),
            rep_grad=rep_grad,
            multi_input=multi_input,
            optim_param={"optim": "sgd", "lr": 0.05},
            scheduler_param=None,
            weight_args=weight_args,
            arch_args={"img_size": [4], "num_experts": [experts]} if experts else {},
        )

    def train(self, trainer: Any, epochs: int = 2) -> Any:
        """The weights (T, epochs, batches)."""
        loader: Any = self.loader
        if trainer.multi_input:  # every task its own data
            batches = self.loader.batches
            loader = {
                task: peers.Loader([(x + k, y[task]) for x, y in batches])
                for k, task in enumerate(self.tasks)
            }
        return trainer.train(loader, loader, epochs, return_weight=True)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    library = peers.libmtl()
    monkeypatch.setattr(sys.modules["LibMTL.trainer"], "torch", peers.CpuTorch())
    for name in ("AbsArchitecture", "MMoE"):
        architecture = getattr(library.architecture, name)
        monkeypatch.setattr(architecture, "zero_grad_share_params", peers.keep_grads)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield Bench(library)
    torch.set_default_dtype(previous)


def shared_part(model: nn.Module) -> list[Tensor]:
    """Parameters of the encoder and the heads, not of the weighting."""
    return [p for name, p in model.named_parameters() if name.startswith(("encoder.", "decoders."))]


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(shared_part(a), shared_part(b), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


#: Ours, LibMTL's, weight_args, rep_grad, how far the parameters may be apart after two epochs,
#: as a share of how far they went (what LibMTL's solver is stopped at).
AGREE = [
    pytest.param("EW", "EW", {}, False, 1e-12, id="EW"),
    pytest.param("PCGrad", "PCGrad", {}, False, 1e-12, id="PCGrad, two tasks"),
    pytest.param("CAGrad", "CAGrad", {"calpha": 0.5, "rescale": 0}, False, 2e-4, id="CAGrad 0"),
    pytest.param("CAGrad", "CAGrad", {"calpha": 0.5, "rescale": 1}, False, 2e-4, id="CAGrad 1"),
    pytest.param("CAGrad", "CAGrad", {"calpha": 0.5, "rescale": 2}, False, 2e-4, id="CAGrad 2"),
    pytest.param("MGDA", "MGDA", {"mgda_gn": "none"}, False, 1e-4, id="MGDA"),
    pytest.param("MGDA", "MGDA", {"mgda_gn": "none"}, True, 1e-4, id="MGDA at representations"),
    pytest.param("IMTL", "IMTL", {}, False, 1e-9, id="IMTL"),
    pytest.param("IMTL", "IMTL", {}, True, 1e-9, id="IMTL at representations"),
    pytest.param("DWA", "DWA", {"T": 2.0}, False, 1e-12, id="DWA"),
]


@pytest.mark.parametrize(("ours", "theirs", "args", "rep_grad", "share"), AGREE)
def test_trainers_agree(
    bench: Bench, ours: str, theirs: str, args: dict[str, Any], rep_grad: bool, share: float
) -> None:
    if ours == "PCGrad":  # in whatever order: one other task
        bench = Bench(bench.library, TASKS[:2])
    swapped = bench.trainer(bench.ours.weighting(ours), rep_grad, **args)
    reference = bench.trainer(getattr(bench.library.weighting, theirs), rep_grad, **args)
    before = copy.deepcopy(reference.model)
    assert distance(swapped.model, before) == 0
    weights = bench.train(swapped, epochs=4)
    expected = bench.train(reference, epochs=4)
    went = distance(reference.model, before)
    assert went > 0.02
    assert distance(swapped.model, reference.model) <= share * went
    if ours in ("EW", "DWA", "MGDA"):  # elsewhere LibMTL's weights are not those of the losses
        np.testing.assert_allclose(weights, expected, atol=1e-3)


#: Other ways to have representations: gated experts, an input of its own for every task.
SHAPES = [
    pytest.param({"experts": 2}, False, id="experts"),
    pytest.param({"experts": 2}, True, id="experts, at representations"),
    pytest.param({"multi_input": True}, False, id="inputs"),
    pytest.param({"multi_input": True}, True, id="inputs, at representations"),
]


@pytest.mark.parametrize(("shape", "rep_grad"), SHAPES)
def test_other_architectures_agree(bench: Bench, shape: dict[str, Any], rep_grad: bool) -> None:
    swapped = bench.trainer(bench.ours.weighting("IMTL"), rep_grad, **shape)
    reference = bench.trainer(bench.library.weighting.IMTL, rep_grad, **shape)
    before = copy.deepcopy(reference.model)
    bench.train(swapped)
    bench.train(reference)
    went = distance(reference.model, before)
    assert went > 0.02
    assert distance(swapped.model, reference.model) <= 1e-9 * went


def test_tasks_with_representations_of_their_own(bench: Bench) -> None:
    """Loss-level methods reach the encoder there, too; what is no weighted sum is refused."""
    trainer = bench.trainer(bench.ours.weighting("EW"), rep_grad=True, experts=2)
    plain = bench.trainer(bench.library.weighting.EW, experts=2)
    bench.train(trainer)
    bench.train(plain)
    assert distance(trainer.model, plain.model) <= 1e-12
    with pytest.raises(ValueError, match="one representation for all tasks"):
        bench.train(bench.trainer(bench.ours.weighting("GradDrop"), rep_grad=True, experts=2))


def test_uncertainty_from_the_start_of_libmtl(bench: Bench) -> None:
    swapped = bench.trainer(bench.ours.weighting("UW", init=-0.5))
    reference = bench.trainer(bench.library.weighting.UW)
    np.testing.assert_allclose(bench.train(swapped), bench.train(reference), rtol=1e-12)
    assert distance(swapped.model, reference.model) <= 1e-12
    scales = [p for name, p in swapped.model.named_parameters() if name.startswith("balancer_")]
    assert torch.allclose(torch.stack(scales), reference.model.loss_scale)


#: What moves the model without a gradient at the representation, and what needs one.
NOT_AT_REPRESENTATIONS = {"pub", "marigold", "db_mtl"}
ONLY_AT_REPRESENTATIONS = {"mgda_ub"}


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("name", fastmto.available())
def test_every_balancer_trains(bench: Bench, name: str, rep_grad: bool) -> None:
    if name in (NOT_AT_REPRESENTATIONS if rep_grad else ONLY_AT_REPRESENTATIONS):
        with pytest.raises(ValueError, match="rep_grad" if rep_grad else "features"):
            bench.train(bench.trainer(bench.ours.weighting(name), rep_grad))
        return
    # LibMTL's loop has no closure for MARIGOLD to evaluate.
    options = {"estimator": "reuse"} if name == "marigold" else {}
    trainer = bench.trainer(bench.ours.weighting(name, **options), rep_grad)
    before = copy.deepcopy(trainer.model)
    weights = bench.train(trainer, epochs=1)
    assert weights.shape == (3, 1, 3)
    assert np.isfinite(weights).all()
    moved = [
        not torch.equal(p, q)
        for p, q in zip(shared_part(trainer.model), shared_part(before), strict=True)
    ]
    assert all(moved)
    assert trainer.model.balancer.stats["steps"] == 3
    if name in ("famo", "marigold"):  # told of the losses after a step by the next batch's
        assert len({tuple(w) for w in weights[:, 0]} | {tuple(w) for w in weights[0]}) > 1
        assert len(np.unique(trainer.model.balancer.weights.numpy())) == 3


def test_one_representation_goes_through_the_encoder_once(bench: Bench) -> None:
    trainer = bench.trainer(bench.ours.weighting("mgda"), rep_grad=True)
    passes = []
    trainer.model.encoder.layers[-1].register_full_backward_hook(lambda *_: passes.append(1))
    bench.train(trainer, epochs=1)
    assert len(passes) == 3


def test_steps_between_searches(bench: Bench) -> None:
    trainer = bench.trainer(bench.ours.weighting("nashmtl"), update_weights_every=2)
    weights = bench.train(trainer, epochs=2)
    assert trainer.model.balancer.stats["searches"] == 3
    assert np.array_equal(weights[:, 0, 0], weights[:, 0, 1])
    assert not np.array_equal(weights[:, 0, 1], weights[:, 0, 2])


def test_nash_clips_the_shared_gradient_alone(bench: Bench) -> None:
    """LibMTL's own Nash_MTL is not on PyPI: against its definition."""
    trainer = bench.trainer(bench.ours.weighting("Nash_MTL"), max_norm=0.5, optim_niter=20)
    trainer.optimizer.step = lambda: None
    bench.train(trainer, epochs=1)
    model = trainer.model
    shared = torch.cat([p.grad.flatten() for p in model.encoder.parameters()])
    assert float(shared.norm()) == pytest.approx(0.5)
    gram, weights = model.info.gram, model.info.weights
    np.testing.assert_allclose((gram @ weights) * weights, np.ones(3), rtol=1e-8)


def test_checkpoint_holds_the_state(bench: Bench) -> None:
    """A run stopped in the middle goes on as if it had not been."""
    weighting = bench.ours.weighting("db_mtl")
    whole, first, second = (bench.trainer(weighting) for _ in range(3))
    bench.train(whole, epochs=2)
    bench.train(first, epochs=1)
    file = io.BytesIO()
    torch.save(first.model.state_dict(), file)
    file.seek(0)
    second.model.load_state_dict(torch.load(file), strict=False)
    bench.train(second, epochs=1)
    assert distance(second.model, whole.model) == 0
    assert second.model.balancer.stats == whole.model.balancer.stats


def test_famo_learns_from_the_next_batch_or_update_w(bench: Bench) -> None:
    trainer = bench.trainer(bench.ours.weighting("FAMO"), FAMO_w_lr=0.1, FAMO_w_gamma=0.0)
    weights = bench.train(trainer)
    assert np.ptp(weights[0]) > 0
    model = trainer.model
    model.update_w(torch.ones(3))
    assert model.balancer._pending == []
    with pytest.raises(TypeError, match="LS takes no losses"):
        bench.trainer(bench.ours.weighting("ls")).model.update_w(torch.ones(3))


def test_weight_args(bench: Bench) -> None:
    with pytest.raises(ValueError, match="dist must be 'Normal'"):
        bench.train(bench.trainer(bench.ours.weighting("RLW"), dist="Uniform"))
    with pytest.raises(ValueError, match=r"give them to weighting\(\.\.\.\)"):
        bench.train(bench.trainer(bench.ours.weighting("UW"), init=1.0))
    with pytest.raises(TypeError, match="argument 'c'"):
        bench.train(bench.trainer(bench.ours.weighting("MGDA"), calpha=1.0))
    with pytest.raises(ValueError, match="name must be one of"):
        bench.ours.weighting("nothing")


def test_registered_names(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.library.weighting, "CAGrad", bench.library.weighting.CAGrad)
    bench.ours.register("CAGrad")
    cls = bench.library.weighting.__dict__["CAGrad"]
    assert issubclass(cls, bench.library.weighting.AbsWeighting)
    trainer = bench.trainer(cls, calpha=0.3, rescale=1)
    bench.train(trainer, epochs=1)
    assert trainer.model.balancer.weighting.c == 0.3


def test_documented_example(bench: Bench) -> None:
    block = peers.documented("fastmto.integrations.libmtl")
    weighting = bench.library.weighting
    own = weighting.CAGrad
    try:
        exec(
            compile(block, "<documentation>", "exec"),
            {
                "Trainer": bench.library.Trainer,
                "HPS": bench.library.architecture.HPS,
                "Encoder": Encoder,
                "decoders": nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS}),
                "task_dict": {task: bench.task() for task in TASKS},
                "train_loader": bench.loader,
                "test_loader": bench.loader,
            },
        )
        assert weighting.CAGrad is not own
    finally:
        weighting.CAGrad = own


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "LibMTL", None)
    monkeypatch.delitem(sys.modules, "fastmto.integrations.libmtl", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fastmto\[libmtl\]'"):
        importlib.import_module("fastmto.integrations.libmtl")
