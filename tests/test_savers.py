"""What savers write of a model whose parameters live in one buffer, with the real packages."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import torchvision
from problems import batch, net
from torch import Tensor, nn

import fastmto
from fastmto.engine.flat import FlatParameters, own_storage

close = torch.testing.assert_close


def optimizers() -> dict[str, object]:
    return {
        "pub": lambda m: fastmto.PUB(m.trunk.parameters(), m.head_parameters()),
        "adatask": lambda m: fastmto.AdaTask(m.trunk.parameters(), m.head_parameters()),
        "pub, flat heads": lambda m: fastmto.PUB(m.trunk.parameters(), m.heads.parameters()),
    }


@pytest.fixture(params=optimizers())
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = optimizers()[request.param](model)
    for t in range(2):
        step(model, optimizer, t)
    return model, optimizer


def step(model: nn.Module, optimizer: fastmto.PUB, t: int) -> None:
    optimizer.zero_grad()
    optimizer.backward(model.losses(batch(t)))
    optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def size_of(value: object) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


def test_a_part_of_a_model_takes_its_own_size() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(400, 400))
    alone = size_of(nn.Linear(8, 8).state_dict())
    FlatParameters(list(model.parameters()))
    assert size_of(model[0].state_dict()) <= alone + 100


def test_storages_are_apart_and_memory_is_one(trained) -> None:
    model, optimizer = trained
    storages = [p.untyped_storage() for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    for p, storage in zip(model.parameters(), storages, strict=True):
        assert storage.nbytes() == p.numel() * p.element_size()
        assert p.storage_offset() == 0
    for store in optimizer._level.stores:
        start = store.flat.data.data_ptr()
        stop = start + store.flat.data.numel() * store.flat.data.element_size()
        assert all(start <= p.data_ptr() < stop for p in store.flat.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (4, 3), (2, 3, 4, 5), (0, 3)])
def test_own_storage(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    buffer = torch.arange(1000, dtype=dtype)
    count = int(torch.tensor(shape).prod()) if shape else 1
    views = [buffer[128 : 128 + count].view(shape)]
    if len(shape) == 4:
        views.append(views[0].to(memory_format=torch.channels_last))
    if len(shape) == 2:
        views.append(buffer[128 : 128 + count].view(shape[::-1]).T)
    for view in views:
        own = own_storage(view)
        assert own.stride() == view.stride()
        assert torch.equal(own, view)
        assert own.untyped_storage().nbytes() == count * dtype.itemsize
        if count:
            assert own.data_ptr() == view.data_ptr()


def test_the_buffer_outlives_its_owner() -> None:
    model = nn.Linear(5, 5)
    before = state(model)
    FlatParameters(list(model.parameters()))
    for _ in range(10):
        torch.full((1000,), 7.0)  # would use the memory again if it were free
    assert_equal(before, state(model))


def test_a_graph_of_before_the_step_is_refused(trained) -> None:
    model, optimizer = trained
    losses = model.losses(batch(5))
    step(model, optimizer, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(losses).backward()


def test_torch_save_deepcopy_and_pickle(trained, tmp_path: Path) -> None:
    model, optimizer = trained
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = net(seed=1)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(state(model), state(other))
    before = state(model)
    twin = copy.deepcopy(model)
    step(model, optimizer, 7)
    assert_equal(before, state(twin))


def test_safetensors(trained, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer = trained
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.save_file(model.state_dict(), str(tmp_path / "state.safetensors"))
    loaded = net(seed=1)
    safetensors.load_model(loaded, str(tmp_path / "model.safetensors"))
    assert_equal(state(model), state(loaded))
    assert_equal(state(model), safetensors.load_file(str(tmp_path / "state.safetensors")))
    before = state(model)
    step(model, optimizer, 3)
    safetensors.load_model(model, str(tmp_path / "model.safetensors"))
    assert_equal(before, state(model))
    step(model, optimizer, 3)  # in place: the parameters still live in the buffer


def test_what_balancers_leave_in_grad_has_storages_of_its_own(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = net()
    balancer = fastmto.get("nashmtl")
    balancer.backward(model.losses(batch(0)), model.trunk.parameters(), model.head_parameters())
    grads = {name: p.grad for name, p in model.named_parameters()}
    safetensors.save_file(grads, str(tmp_path / "grads.safetensors"))
    assert_equal(grads, safetensors.load_file(str(tmp_path / "grads.safetensors")))
    assert size_of(model.trunk[0].bias.grad) < 2000
    optimizer = fastmto.PUB(net().trunk.parameters(), [[], [], []])
    assert optimizer is not None


def test_moments_have_storages_of_their_own(trained, tmp_path: Path) -> None:
    model, optimizer = trained
    bias = model.trunk[0].bias
    if optimizer.state[bias]["exp_avg"].shape == bias.shape:
        assert size_of(optimizer.state[bias]) < 4000
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(saved)


def test_accelerate(trained, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer = trained
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    accelerator.save_model(model, str(tmp_path / "model"))
    written = safetensors.load_file(str(tmp_path / "model" / "model.safetensors"))
    assert_equal(state(model), written)
    accelerator.save_state(str(tmp_path / "state"))
    before = state(model)
    ends = []
    for _ in range(2):
        for t in range(3, 6):
            prepared.zero_grad()
            prepared.optimizer.backward(model.losses(batch(t)))
            prepared.step()
        ends.append(state(model))
        accelerator.load_state(str(tmp_path / "state"))
        assert_equal(before, state(model))
    assert_equal(*ends)


def transformers_without_torchvision() -> Any:
    transformers = pytest.importorskip("transformers")
    imports = pytest.importorskip("transformers.utils.import_utils")
    for available in (imports.is_torchvision_available, imports.is_torchvision_v2_available):
        getattr(available, "cache_clear", lambda: None)()
    return transformers


def test_transformers_save_pretrained(tmp_path: Path) -> None:
    with torchvision(names=False):
        transformers = transformers_without_torchvision()
        PreTrainedModel, PretrainedConfig = (
            transformers.PreTrainedModel,
            transformers.PretrainedConfig,
        )

    class Config(PretrainedConfig):
        model_type = "net"

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.net = net()
            self.post_init()

    model = Model(Config())
    optimizer = fastmto.PUB(model.net.trunk.parameters(), model.net.head_parameters())
    for t in range(2):
        step(model.net, optimizer, t)
    model.save_pretrained(tmp_path)
    assert_equal(state(model), state(Model.from_pretrained(tmp_path)))


def test_a_checkpoint_of_torch_distributed(trained, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    model, optimizer = trained
    before = state(model)
    with pytest.warns(UserWarning, match="torch.distributed is"):
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    step(model, optimizer, 8)
    with pytest.warns(UserWarning, match="torch.distributed is"):
        checkpoint.load({"model": model.state_dict()}, checkpoint_id=tmp_path)
    assert_equal(before, state(model))
    step(model, optimizer, 9)


def test_assigned_parameters_are_refused_with_the_way_out(trained) -> None:
    model, optimizer = trained
    model.load_state_dict(net(seed=2).state_dict(), assign=True)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"assign=True.*build the optimizer"):
        optimizer.backward(model.losses(batch(1)))
