"""Models: their size, who owns which parameter, and what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmto.experiments.arguments import DEFAULTS, MODELS
from fastmto.experiments.data import load_digits
from fastmto.experiments.experiment import Experiment
from fastmto.experiments.models import MMOE, PLE, MultiTaskModel, SharedBottom, TabularEncoder
from fastmto.experiments.models.base import count
from fastmto.experiments.models.mmoe import Experts
from fastmto.experiments.models.ple import mix

#: 32 fields with 496 values in all, as the census data have.
FIELDS = (15,) * 31 + (31,)


def batch(n_rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(n_rows, 7, generator=generator)
    ids = torch.randint(0, 15, (n_rows, 32), generator=generator)
    return dense, (ids + 15 * torch.arange(32)).int()


def small_ple(n_outputs: list[int], widths: tuple[int, ...]) -> PLE:
    return PLE(
        7, FIELDS, n_outputs, embedding=4, extraction_widths=widths, n_shared_experts=2,
        n_task_experts=3, tower_widths=(8,),
    )  # fmt: skip


def models() -> list[MultiTaskModel]:
    torch.manual_seed(0)
    return [
        MMOE(7, FIELDS, [1, 1]),
        MMOE(7, FIELDS, [1, 3], embedding=4, n_experts=3, expert_widths=(9, 6), tower_widths=()),
        small_ple([1, 1], (9,)),
        small_ple([1, 3], (9, 6)),
        small_ple([1, 2, 1], (9, 6, 5, 4)),
        SharedBottom(7, FIELDS, [1, 1]),
        SharedBottom(7, FIELDS, [2, 1, 1], embedding=4, bottom=(), tower_widths=(5,)),
    ]


def test_mmoe_has_the_published_size() -> None:
    model = MMOE(7, FIELDS, [1, 1])
    assert sum(FIELDS) == 496
    assert count(model.parameters()) == 574_866
    assert count(model.shared_parameters()) == 549_760
    assert [count(task) for task in model.task_parameters()] == [12_553, 12_553]


def test_ple_has_the_published_size() -> None:
    """PUB's sizes, T = 2: 15,010,328 shared and 126,242 task-specific parameters beside the table.

    There batch normalisation follows every expert and every layer of a tower, a shared gate on top
    is read by nothing, and the top layer's task experts count as shared.
    """
    fields = (31,) * 16
    model = PLE(63, fields, [1, 1])
    table, experts = 128 * sum(fields), 3 * 4
    shared_norms, tower_norms = 2 * experts * (512 + 256), 2 * (128 + 64)
    unread_gate = 512 * experts + experts
    top_own = 2 * 4 * (512 * 256 + 256)
    shared = count(model.shared_parameters()) - table
    assert shared + top_own + shared_norms + unread_gate == 15_010_328
    own = [count(task) for task in model.task_parameters()]
    assert own[0] == own[1]
    assert sum(own) - top_own + 2 * tower_norms == 126_242


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
    # Zeros where a head does not look: PLE's tasks have parts of the representation of their own.
    at_features = torch.autograd.grad(loss, features, retain_graph=True, materialize_grads=True)
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
    assert shapes == [
        [(5,), (5,)],
        [(5,), (5, 3)],
        [(5,), (5,)],
        [(5,), (5, 3)],
        [(5,), (5, 2), (5,)],
        [(5,), (5,)],
        [(5, 2), (5,), (5,)],
    ]


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


def ple_logits(model: PLE, x: torch.Tensor, j: int) -> torch.Tensor:
    """Task j's logits by the recursion of the paper, one expert at a time."""
    shared, tasks = x, [x] * len(model.towers)
    for layer in model.layers:
        common = list(layer.shared(shared).unbind(1))
        own = [list(experts(t).unbind(1)) for t, experts in zip(tasks, layer.own, strict=True)]
        following = []
        for t, gate, mine in zip(tasks, layer.gates, own, strict=True):
            share = gate(t).softmax(dim=1)
            outputs = [*mine, *common]
            following.append(sum(share[:, e, None] * h for e, h in enumerate(outputs)))
        if layer.shared_gate is not None:
            share = layer.shared_gate(shared).softmax(dim=1)
            outputs = [h for mine in own for h in mine] + common
            shared = sum(share[:, e, None] * h for e, h in enumerate(outputs))
        tasks = following
    return model.towers[j](tasks[j]).squeeze(1)


@pytest.mark.parametrize("widths", [(9,), (9, 6), (9, 6, 5), (9, 6, 5, 4)])
def test_ple_is_the_recursion_of_the_paper(widths: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    model = small_ple([1, 2, 1], widths).double()
    dense, ids = batch()
    x = model.encoder(dense.double(), ids)
    for j, output in enumerate(model(dense.double(), ids)):
        torch.testing.assert_close(output, ple_logits(model, x, j), rtol=0, atol=1e-14)


@pytest.mark.parametrize("widths", [(9,), (9, 6), (9, 6, 5), (9, 6, 5, 4)])
def test_ple_counts_as_shared_what_two_tasks_reach_and_nothing_else(
    widths: tuple[int, ...],
) -> None:
    """Autograd decides who owns a parameter; of the experts of tasks only the top layer's."""
    torch.manual_seed(4)
    model = small_ple([1, 1], widths)
    reached: list[set[str]] = []
    for output in model(*batch()):
        model.zero_grad()
        output.sum().backward(retain_graph=True)
        reached.append({name for name, p in model.named_parameters() if p.grad is not None})
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in model.shared_parameters()} == reached[0] & reached[1]
    own = [{names[id(p)] for p in task} for task in model.task_parameters()]
    assert own == [reached[0] - reached[1], reached[1] - reached[0]]
    top = len(widths) - 1
    owned = own[0] | own[1]
    assert {int(n.split(".")[1]) for n in owned if ".own." in n} == {top}
    assert {int(n.split(".")[1]) for n in owned if ".gates." in n} == {top, max(top - 1, 0)}


def test_shares_of_a_gate_add_up_to_one() -> None:
    """A mixture of equal vectors is that vector, and of one group left out it falls short."""
    torch.manual_seed(5)
    gate, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    vector = torch.randn(3, dtype=torch.float64)
    groups = [vector.expand(4, 2, 3), vector.expand(4, 3, 3)]
    torch.testing.assert_close(mix(gate, x, groups), vector.expand(4, 3), rtol=1e-14, atol=1e-14)
    without = mix(gate, x, [groups[0], torch.zeros(4, 3, 3, dtype=torch.float64)])
    share = gate(x).softmax(dim=1)[:, :2].sum(dim=1, keepdim=True)
    torch.testing.assert_close(without, share * vector, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extraction_widths": ()}, "at least one layer"),
        ({"n_shared_experts": 0}, "got 0 and 4"),
        ({"n_task_experts": 0}, "got 4 and 0"),
    ],
)
def test_ple_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLE(7, FIELDS, [1, 1], **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_trains_every_model(name: str) -> None:
    data = load_digits(0)
    defaults = DEFAULTS["digits"]
    experiment = Experiment(
        data="digits", model=name, sizes=defaults.sizes[name], epochs=1, batch_size=512, lr=1e-3,
        weight_decay=0.0, update_weights_every=2,
    )  # fmt: skip
    result = experiment.train(data, "pub", seed=0)
    losses = result.steps.losses
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
    assert result.stats["searches"] == 20
    assert set(DEFAULTS["census"].sizes) == set(MODELS)


def test_the_same_seed_builds_the_same_model() -> None:
    for one, other in zip(models(), models(), strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
