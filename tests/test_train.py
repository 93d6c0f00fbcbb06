"""The training loop: what it records, that it repeats, and how it counts balancing time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import fastmto
from fastmto.experiments.arguments import BALANCERS
from fastmto.experiments.data import MultiTaskData, Split, Task, load_digits
from fastmto.experiments.models import MMOE, SharedBottom
from fastmto.experiments.optimizers import METHOD_LR, Balanced, balancer, search_every
from fastmto.experiments.records import Steps, TrainResult
from fastmto.experiments.records import timing as timing_of
from fastmto.experiments.train import PROBE_EVERY, evaluate, task_losses, train


@pytest.fixture(scope="module")
def data() -> MultiTaskData:
    return load_digits(n_train=1000, n_validation=200, n_test=200)


def model(data: MultiTaskData, seed: int = 0) -> SharedBottom:
    torch.manual_seed(seed)
    n_outputs = [task.n_outputs for task in data.tasks]
    return SharedBottom(data.n_dense, (), n_outputs, embedding=32, bottom=(32,), tower_widths=(16,))


def run(data: MultiTaskData, name: str, seed: int = 0, epochs: int = 2) -> TrainResult:
    return train(
        model(data),
        data,
        balancer(name, lr=1e-2, update_weights_every=5),
        epochs=epochs,
        batch_size=64,
        seed=seed,
        name=name,
    )


def test_names_are_those_of_the_library_and_some_more() -> None:
    assert set(fastmto.available()) < set(BALANCERS)
    assert len(set(BALANCERS)) == len(BALANCERS)


@pytest.mark.parametrize("name", BALANCERS)
def test_every_balancer_learns_and_is_recorded(data: MultiTaskData, name: str) -> None:
    result = run(data, name)
    n_steps = 2 * math.ceil(1000 / 64)
    assert result.steps.losses.shape == result.steps.weights.shape == (n_steps, 2)
    assert len(result.epochs) == 2
    for task in data.tasks:
        first, last = result.epochs[0], result.epochs[-1]
        assert last.train_losses[task.name] < 0.95 * first.train_losses[task.name]
        assert last.test[task.name] > 0.2  # a tenth would be guessing
    assert result.stats["steps"] == n_steps
    assert result.stats["backwards"] == result.steps.backwards.sum()
    assert np.isfinite(result.steps.weights).all()
    assert (result.steps.weights.sum(axis=1) > 0).all()
    for seconds in (result.steps.forward, result.steps.backward, result.steps.update):
        assert (seconds > 0).all()
    assert sum(epoch.seconds for epoch in result.epochs) == pytest.approx(
        sum(t.sum() for t in (result.steps.forward, result.steps.backward, result.steps.update))
    )
    n_probes = 0 if name == "equal" else math.ceil(n_steps / PROBE_EVERY)
    assert result.steps.probes.shape == (n_probes, 2)


def test_pub_searches_when_told(data: MultiTaskData) -> None:
    result = run(data, "pub")
    expected = np.where(np.arange(len(result.steps.backwards)) % 5 == 0, 2, 1)
    assert result.steps.backwards.tolist() == expected.tolist()
    changes = np.flatnonzero(np.abs(np.diff(result.steps.weights, axis=0)).max(axis=1)) + 1
    assert set(changes) <= set(range(0, len(expected), 5))


@pytest.mark.parametrize("name", ["equal", "pub"])
def test_a_seed_repeats_a_run_bit_for_bit(data: MultiTaskData, name: str) -> None:
    one, other, another = (run(data, name, seed, epochs=1) for seed in (0, 0, 1))
    assert np.array_equal(one.steps.losses, other.steps.losses)
    assert np.array_equal(one.steps.weights, other.steps.weights)
    assert one.epochs[-1].test == other.epochs[-1].test
    assert not np.array_equal(one.steps.losses, another.steps.losses)


def test_linear_scalarization_is_equal_weighting(data: MultiTaskData) -> None:
    equal, ls = run(data, "equal", epochs=1), run(data, "ls", epochs=1)
    assert np.array_equal(equal.steps.losses, ls.steps.losses)
    assert equal.epochs[-1].test == ls.epochs[-1].test


@pytest.mark.parametrize(
    ("name", "every"), [("famo", 1), ("gradnorm", 1), ("nashmtl", 10), ("db_mtl", 10), ("pub", 10)]
)
def test_search_every_unless_told(data: MultiTaskData, name: str, every: int) -> None:
    assert search_every(name) == every
    result = train(model(data), data, balancer(name, lr=1e-2), epochs=1, batch_size=64)
    assert result.stats["searches"] == math.ceil(16 / every)


def test_a_method_that_looks_back_hears_of_the_losses_after_the_step(data: MultiTaskData) -> None:
    result = run(data, "famo", epochs=1)
    assert len(np.unique(result.steps.weights[:, 0])) == 4  # searched every 5 of 16 steps
    made = balancer("famo", lr=1e-2)(model(data))
    assert isinstance(made, Balanced)
    assert made.looks_back
    other = balancer("nashmtl", lr=1e-2)(model(data))
    assert isinstance(other, Balanced)
    assert not other.looks_back


def test_a_methods_own_parameters_are_a_group_without_decay(data: MultiTaskData) -> None:
    made = balancer("uncertainty", lr=1e-2, weight_decay=0.1)(model(data))
    assert isinstance(made, Balanced)
    first, own = made.optimizer.param_groups
    assert (first["lr"], first["weight_decay"]) == (1e-2, 0.1)
    assert (own["lr"], own["weight_decay"]) == (METHOD_LR, 0.0)
    assert len(own["params"]) == 2
    weights = run(data, "uncertainty", epochs=1).steps.weights
    assert np.ptp(weights[:, 0]) > 0.02


def test_methods_at_the_features_pass_the_trunk_once_a_search(data: MultiTaskData) -> None:
    result = run(data, "mgda_ub", epochs=1)
    # A search: two heads, then the trunk; between searches the heads, then the trunk.
    assert result.steps.backwards.tolist() == [3 if k % 5 == 0 else 2 for k in range(16)]


@pytest.mark.parametrize("name", ["pub", "adatask", "clippy", "nashmtl", "famo"])
def test_probes_do_not_change_a_run(
    data: MultiTaskData, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for every in (2, 1000):
        monkeypatch.setattr("fastmto.experiments.train.PROBE_EVERY", every)
        results.append(run(data, name, epochs=1))
    assert [len(result.steps.probes) for result in results] == [8, 1]
    assert np.array_equal(results[0].steps.losses, results[1].steps.losses)
    assert results[0].epochs[-1].test == results[1].epochs[-1].test


def test_equal_weighting_is_the_plain_loop(data: MultiTaskData) -> None:
    result = run(data, "equal", epochs=1)
    net = model(data)
    adam = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    expected = []
    for index in order.split(64):
        losses = task_losses(net, data.tasks, data.train.rows(index))
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
        expected.append(losses.tolist())
    assert result.steps.losses.tolist() == expected
    assert result.epochs[0].test == evaluate(net, data.tasks, data.test)


def test_every_training_row_is_used_once_an_epoch(data: MultiTaskData) -> None:
    seen: list[torch.Tensor] = []

    class Watch(SharedBottom):
        def represent(self, dense: torch.Tensor, categorical: torch.Tensor) -> list[torch.Tensor]:
            if torch.is_grad_enabled():
                seen.append(dense.detach())
            return super().represent(dense, categorical)

    net = Watch(data.n_dense, (), [10, 10], embedding=4, bottom=(4,))
    train(net, data, balancer("equal", lr=1e-3), epochs=1, batch_size=300)
    assert [len(rows) for rows in seen] == [300, 300, 300, 100]
    rows = torch.cat(seen)
    assert torch.equal(rows.sum(dim=1).sort().values, data.train.dense.sum(dim=1).sort().values)


def test_on_step_gets_every_steps_losses(data: MultiTaskData) -> None:
    heard: list[list[float]] = []
    result = train(
        model(data),
        data,
        balancer("equal", lr=1e-3),
        epochs=1,
        batch_size=500,
        on_step=lambda losses: heard.append(losses.tolist()),
    )
    assert heard == result.steps.losses.tolist()


def steps(n: int, backwards: list[int], **seconds: list[float]) -> Steps:
    ones = np.ones(n)
    return Steps(
        losses=np.ones((n, 2)),
        weights=np.ones((n, 2)),
        backwards=np.array(backwards),
        forward=np.array(seconds.get("forward", ones)),
        backward=np.array(seconds.get("backward", ones)),
        update=np.array(seconds.get("update", ones)),
        probes=np.array([[0.010, 0.001]] * 3),
    )


def test_balancing_share_counts_what_equal_weighting_does_not_pay() -> None:
    """One search in four: 10 ms of forward, backwards of 10 and 22 ms, updates of 2 and 4 ms."""
    timing = timing_of(
        steps(
            8,
            [2, 1, 1, 1] * 2,
            forward=[0.010] * 8,
            backward=[0.022, 0.010, 0.010, 0.010] * 2,
            update=[0.004, 0.002, 0.002, 0.002] * 2,
        ),
        plain=False,
    )
    assert timing.backward == pytest.approx((22 + 3 * 10) / 4)
    assert timing.update == pytest.approx((4 + 3 * 2) / 4)
    assert timing.step == pytest.approx(10 + 13 + 2.5)
    assert (timing.plain_backward, timing.plain_update) == pytest.approx((10, 1))
    assert timing.balancing_share == pytest.approx((13 - 10 + 2.5 - 1) / 25.5)
    assert timing.relative == pytest.approx(25.5 / 21)


def test_a_stalled_step_does_not_count() -> None:
    seconds = {"forward": [0.01] * 9, "backward": [0.01] * 8 + [5.0], "update": [0.001] * 9}
    timing = timing_of(steps(9, [1] * 9, **seconds), plain=False)
    assert timing.step == pytest.approx(21)
    assert timing.balancing_share == pytest.approx(0, abs=1e-12)


def test_equal_weighting_has_no_balancing_time() -> None:
    seconds = {"forward": [0.01] * 4, "backward": [0.03] * 4, "update": [0.002] * 4}
    timing = timing_of(steps(4, [1] * 4, **seconds), plain=True)
    assert timing.balancing_share == 0
    assert timing.relative == 1
    assert timing.plain_backward == timing.backward == pytest.approx(30)


def test_a_run_as_json_is_thin_and_has_no_nan(data: MultiTaskData) -> None:
    result = run(data, "pub")
    result.steps.losses[3] = np.nan
    report = json.loads(json.dumps(result.as_json(max_points=12), allow_nan=False))
    log = report["steps"]
    assert log["number"] == list(range(1, 33, 3))
    assert log["losses"][1] == [None, None]
    assert log["weights"][2] == result.steps.weights[6].tolist()
    assert {len(column) for column in log.values()} == {11}
    assert report["epochs"][1]["test"] == result.epochs[1].test
    assert report["balancing_share"] == result.timing.balancing_share
    assert report["relative_step"] == result.timing.relative
    assert report["settings"].startswith("PUB(")
    assert "lr: 0.01" in report["settings"]


def test_a_diverged_model_scores_nan() -> None:
    split = Split(torch.tensor([[1.0], [math.inf]]), torch.empty(2, 0).int(), torch.eye(2).long())
    net = SharedBottom(1, (), [1, 1], embedding=2, bottom=(2,))
    scores = evaluate(net, (Task("a"), Task("b")), split)
    assert all(math.isnan(score) for score in scores.values())


def test_binary_tasks_with_categorical_fields() -> None:
    """A rule that only the ids tell is learned to an AUC near 1; unseen ids do no harm."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (2000, 2), generator=generator)
    targets = torch.stack([ids[:, 0] % 2, (ids[:, 1] > 2).long()], dim=1)
    ids = ids + torch.tensor([0, 6])
    ids[-1] = 12
    split = Split(torch.empty(2000, 0), ids.int(), targets)
    data = MultiTaskData("rule", (Task("a"), Task("b")), (6, 6), split, split, split)
    torch.manual_seed(0)
    net = MMOE(0, data.field_sizes, [1, 1], embedding=4, n_experts=2, expert_widths=(8,))
    result = train(net, data, balancer("pub", lr=1e-2), epochs=4, batch_size=100)
    assert min(result.epochs[-1].test.values()) > 0.99


def test_refusals(data: MultiTaskData) -> None:
    with pytest.raises(ValueError, match=r"balancer must be one of equal, .* got 'nash'"):
        balancer("nash", lr=1e-3)
    for wrong in ({"epochs": 0, "batch_size": 1}, {"epochs": 1, "batch_size": 0}):
        with pytest.raises(ValueError, match="epochs and batch_size must be >= 1"):
            train(model(data), data, balancer("equal", lr=1e-3), **wrong)
