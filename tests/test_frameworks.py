"""Training under Lightning and accelerate, with the real packages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from problems import batch, net
from torch import Tensor, nn

import fastmto

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def plain_steps(steps: int, **options: Any) -> dict[str, Tensor]:
    """The parameters after steps of PUB without a framework."""
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), **options)
    for t in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch(t)))
        optimizer.step()
    return state(model)


class Data(torch.utils.data.Dataset):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, t: int) -> int:
        return t


def lightning_module(balancer: str = "pub", clip: bool = False) -> Any:
    lightning = peers.lightning()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = net()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if balancer == "pub":
                return fastmto.PUB(
                    self.net.trunk.parameters(), self.net.head_parameters(), update_weights_every=3
                )
            self.balancer = fastmto.get(balancer, update_weights_every=2)
            return torch.optim.Adam(self.net.parameters(), lr=1e-3)

        def training_step(self, numbers: Tensor, batch_idx: int) -> None:
            del numbers, batch_idx  # Lightning does not resume within an epoch of any loader
            optimizer = self.optimizers()
            optimizer.zero_grad()
            losses = self.net.losses(batch(self.global_step))
            if balancer == "pub":
                optimizer.backward(losses)
            else:
                shared, heads = self.net.trunk.parameters(), self.net.head_parameters()
                self.balancer.backward(losses, shared, heads)
            if clip:
                self.clip_gradients(optimizer, gradient_clip_val=1e-3)
            optimizer.step()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if balancer != "pub":
                checkpoint["balancer"] = self.balancer.state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.saved = checkpoint.get("balancer")

        def on_train_start(self) -> None:
            if getattr(self, "saved", None) is not None:
                self.balancer.load_state_dict(self.saved)

    return Module()


def fit(module: Any, steps: int, path: Path, resume: Path | None = None) -> None:
    trainer = peers.lightning().Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
    )
    loader = torch.utils.data.DataLoader(Data(8), batch_size=1)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False if resume else None)
    trainer.save_checkpoint(path / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("balancer", ["pub", "nashmtl"])
def test_lightning_trains_as_the_plain_loop_does_and_resumes(balancer: str, tmp_path: Path) -> None:
    whole, half, rest = (lightning_module(balancer) for _ in range(3))
    fit(whole, 8, tmp_path)
    if balancer == "pub":
        assert_equal(plain_steps(8, update_weights_every=3), state(whole.net))
    fit(half, 4, tmp_path)
    fit(rest, 8, tmp_path, resume=tmp_path / "last.ckpt")
    assert_equal(state(whole.net), state(rest.net))


@pytest.mark.filterwarnings("ignore")
def test_lightning_s_clipping_is_refused_with_the_argument_that_does_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="clip_norm="):
        fit(lightning_module(clip=True), 2, tmp_path)


@pytest.mark.parametrize("update_weights_every", [1, 3])
def test_accelerate_trains_as_the_plain_loop_does(update_weights_every: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    optimizer = fastmto.PUB(
        model.trunk.parameters(),
        model.head_parameters(),
        update_weights_every=update_weights_every,
    )
    model, prepared = accelerator.prepare(model, optimizer)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    for t in range(6):
        prepared.zero_grad()
        prepared.optimizer.backward(model.losses(batch(t)))
        prepared.step()
        schedule.step()
    expected = plain_steps(6, update_weights_every=update_weights_every)
    assert_equal(expected, state(model))


def test_a_copy_of_an_optimizer_s_attributes_is_the_optimizer() -> None:
    """What Lightning's wrapper is."""
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    wrapper = fastmto.PUB.__new__(fastmto.PUB)
    wrapper.__dict__.update(optimizer.__dict__)
    for t in range(3):
        wrapper.zero_grad()
        wrapper.backward(model.losses(batch(t)))
        optimizer.step()
    assert_equal(plain_steps(3), state(model))
    assert wrapper.stats == optimizer.stats
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    wrapper.backward(model.losses(batch(3)))
    optimizer.step()
    assert_equal(plain_steps(4), state(model))


def test_lazy_modules_are_named_with_the_way_out() -> None:
    lazy = nn.LazyLinear(4)
    head = nn.Linear(4, 1)
    with pytest.raises(ValueError, match=r"shared_parameters\[0\].*lazy module: run one"):
        fastmto.PUB(lazy.parameters(), [head.parameters()])
    with pytest.raises(ValueError, match=r"task_parameters\[0\]\[0\].*run one forward"):
        fastmto.PUB(head.parameters(), [lazy.parameters()])
    loss = head(torch.ones(2, 4)).sum()
    with pytest.raises(ValueError, match=r"shared_parameters\[0\].*run one forward"):
        fastmto.get("nashmtl").backward([loss, loss], lazy.parameters())
    lazy(torch.ones(2, 3))
    fastmto.PUB(lazy.parameters(), [head.parameters()])
