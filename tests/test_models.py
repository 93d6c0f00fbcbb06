"""Models: their size, who owns which parameter, and what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmto.models import MMOE, MultiTaskModel, SharedBottom, TabularEncoder
from fastmto.models.base import count
from fastmto.models.mmoe import Experts

#: 32 fields with 496 values in all, as the census data have.
FIELDS = (15,) * 31 + (31,)


def batch(n_rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(n_rows, 7, generator=generator)
    ids = torch.randint(0, 15, (n_rows, 32), generator=generator)
    return dense, (ids + 15 * torch.arange(32)).int()


def models() -> list[MultiTaskModel]:
    torch.manual_seed(0)
    return [
        MMOE(7, FIELDS, [1, 1]),
        MMOE(7, FIELDS, [1, 3], embedding=4, n_experts=3, expert_widths=(9, 6), tower_widths=()),
        SharedBottom(7, FIELDS, [1, 1]),
        SharedBottom(7, FIELDS, [2, 1, 1], embedding=4, bottom=(), tower_widths=(5,)),
    ]


def test_mmoe_has_the_published_size() -> None:
    model = MMOE(7, FIELDS, [1, 1])
    assert sum(FIELDS) == 496
    assert count(model.parameters()) == 574_866
    assert count(model.shared_parameters()) == 549_760
    assert [count(task) for task in model.task_parameters()] == [12_553, 12_553]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_a_task_reaches_the_shared_parameters_and_its_own(model: MultiTaskModel) -> None:
    shared, own = model.shared_parameters(), model.task_parameters()
    everything = [*shared, *(p for task in own for p in task)]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
    assert len(everything) == len(list(model.parameters()))
    for i, output in enumerate(model(*batch())):
        model.zero_grad()
        output.square().sum().backward(retain_graph=True)
        assert all(p.grad is not None for p in [*shared, *own[i]])
        others = [p for j, task in enumerate(own) if j != i for p in task]
        # A task's gate is computed together with the others': their gradients exist and are 0.
        assert all(p.grad is None or not p.grad.any() for p in others)


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_gradients_at_the_representation_sent_on_are_those_of_the_parameters(
    model: MultiTaskModel,
) -> None:
    model = model.double()
    dense, ids = batch()
    shared = model.shared_parameters()
    expected = torch.autograd.grad(
        model(dense.double(), ids)[0].square().sum(), shared, allow_unused=True
    )
    features = model.represent(dense.double(), ids)
    loss = model.heads(features)[0].square().sum()
    at_features = torch.autograd.grad(loss, features, retain_graph=True)
    sent_on = torch.autograd.grad(features, shared, at_features, allow_unused=True)
    for direct, other in zip(expected, sent_on, strict=True):
        torch.testing.assert_close(direct, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_the_last_shared_layer_lies_before_every_head(model: MultiTaskModel) -> None:
    last = model.last_shared_parameters()
    assert last
    assert {id(p) for p in last} <= {id(p) for p in model.shared_parameters()}
    for output in model(*batch()):
        grads = torch.autograd.grad(output.square().sum(), last, retain_graph=True)
        assert all(grad.any() for grad in grads)


def test_outputs_have_one_entry_a_row_or_one_a_class() -> None:
    shapes = [[tuple(output.shape) for output in model(*batch())] for model in models()]
    assert shapes == [[(5,), (5,)], [(5,), (5, 3)], [(5,), (5,)], [(5, 2), (5,), (5,)]]


def test_a_batch_of_one_row_keeps_its_dimension() -> None:
    for model in models():
        assert [len(output) for output in model(*batch(1))] == [1] * len(model.task_parameters())


def test_an_unseen_value_is_a_zero_vector() -> None:
    encoder = TabularEncoder(2, (3, 4), embedding=5)
    dense = torch.rand(1, 2)
    known = encoder(dense, torch.tensor([[1, 6]]))
    unseen = encoder(dense, torch.tensor([[1, 7]], dtype=torch.int32))
    assert torch.equal(unseen[:, :5], known[:, :5])
    assert not unseen[:, 5:10].any()
    assert torch.equal(unseen[:, 10:], known[:, 10:])
    assert encoder.table is not None
    assert torch.equal(known[0, 5:10], encoder.table.weight[6])


def test_encoder_without_dense_columns_or_without_fields() -> None:
    assert TabularEncoder(0, (3,), 4)(torch.empty(2, 0), torch.tensor([[0], [2]])).shape == (2, 4)
    no_ids = torch.empty(2, 0, dtype=torch.int32)
    assert TabularEncoder(3, (), 4)(torch.rand(2, 3), no_ids).shape == (2, 4)


@pytest.mark.parametrize(
    ("n_dense", "fields", "message"),
    [(0, (), "got neither"), (-1, (2,), "n_dense must be >= 0"), (1, (0,), "field size >= 1")],
)
def test_encoder_refuses(n_dense: int, fields: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabularEncoder(n_dense, fields, 4)


def test_experts_are_separate_networks() -> None:
    """The wide product equals E networks of their own, built from its slices."""
    torch.manual_seed(1)
    experts = Experts(3, 11, (6, 5)).double()
    x = torch.rand(4, 11, dtype=torch.float64)
    together = experts(x)
    for e in range(3):
        first = nn.functional.linear(
            x, experts.first.weight[6 * e : 6 * e + 6], experts.first.bias[6 * e : 6 * e + 6]
        ).relu()
        alone = (first @ experts.weights[0][e] + experts.biases[0][e]).relu()
        torch.testing.assert_close(together[:, e], alone, rtol=0, atol=1e-14)


def test_mmoe_mixes_experts_by_each_tasks_gate() -> None:
    torch.manual_seed(2)
    model = MMOE(7, FIELDS, [1, 1], embedding=4, n_experts=3, expert_widths=(6,)).double()
    dense, ids = batch()
    x = model.encoder(dense.double(), ids)
    outputs = model(dense.double(), ids)
    for gate, head, output in zip(model.gates, model.towers, outputs, strict=True):
        share = gate(x).softmax(dim=1)
        mixed = sum(share[:, e, None] * model.experts(x)[:, e] for e in range(3))
        torch.testing.assert_close(output, head(mixed)[:, 0], rtol=0, atol=1e-14)


def test_the_same_seed_builds_the_same_model() -> None:
    for one, other in zip(models(), models(), strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
