"""Digits and census: layout, determinism, what the loader says of bad files."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmto.experiments.data import MultiTaskData, Split, Task, load_census, load_digits
from fastmto.experiments.data.census import CATEGORICAL, COLUMNS, DENSE
from fastmto.experiments.data.digits import SHIFT, SIDE

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
}


def line(**values: str) -> str:
    """A row in the published layout, "x" and 0 where `values` says nothing."""
    unknown = set(values) - set(COLUMNS)
    assert not unknown, unknown
    defaults = {name: "0" if name in DENSE else "x" for name in COLUMNS}
    return ", ".join({**defaults, **values}.values())


TRAIN = [
    line(age="20", year="94", income_50k="- 50000.", marital_stat="Never married", sex="b"),
    line(age="60", year="95", income_50k="50000+.", marital_stat="Widowed", sex="a"),
    line(age="30", year="94", income_50k="- 50000.", marital_stat="Divorced", citizenship="U S "),
]
TEST = [
    line(age=str(age), year=year, income_50k="50000+.", marital_stat="Never married")
    for age, year in [(20, "94"), (40, "95"), (100, "96"), (60, "??")]
]


def write(folder: Path, train: list[str], test: list[str], suffix: str = "") -> Path:
    for name, rows in (("census-income.data", train), ("census-income.test", test)):
        content = "".join(row + "\n" for row in rows).encode()
        (folder / (name + suffix)).write_bytes(PACK[suffix](content))
    return folder


def parts(data: MultiTaskData) -> list[Split]:
    return [data.train, data.validation, data.test]


def assert_same(one: MultiTaskData, other: MultiTaskData) -> None:
    assert one.field_sizes == other.field_sizes
    for a, b in zip(parts(one), parts(other), strict=True):
        assert torch.equal(a.dense, b.dense)
        assert torch.equal(a.categorical, b.categorical)
        assert torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("suffix", PACK)
def test_census_reads_plain_and_packed_files(tmp_path: Path, suffix: str) -> None:
    data = load_census(write(tmp_path, TRAIN, TEST, suffix))
    assert [task.name for task in data.tasks] == ["income", "marital"]
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 2, 2)
    assert data.train.targets.tolist() == [[0, 1], [1, 0], [0, 0]]
    assert data.train.dense.dtype == torch.float32
    # Min-max by the training part: 20 -> 0, 60 -> 1; constant columns -> 0.
    assert data.train.dense[:, 0].tolist() == [0.0, 1.0, 0.25]
    assert not data.train.dense[:, 1:].any()
    rest = torch.cat([data.validation.dense, data.test.dense])[:, 0]
    assert sorted(rest.tolist()) == [0.0, 0.5, 1.0, 2.0]


def test_census_ids_are_sorted_by_value_and_unseen_ones_share_one(tmp_path: Path) -> None:
    data = load_census(write(tmp_path, TRAIN, TEST))
    expected = {"year": 2, "sex": 3, "citizenship": 2}
    assert data.field_sizes == tuple(expected.get(name, 1) for name in CATEGORICAL)
    reserved = sum(data.field_sizes)
    sex = CATEGORICAL.index("sex")
    first = sum(data.field_sizes[:sex])
    assert data.train.categorical[:, sex].tolist() == [first + 1, first, first + 2]  # b, a, x
    year = CATEGORICAL.index("year")
    first = sum(data.field_sizes[:year])
    ages = torch.cat([data.validation.dense, data.test.dense])[:, 0]
    years = torch.cat([data.validation.categorical, data.test.categorical])[:, year]
    by_age = dict(zip(ages.tolist(), years.tolist(), strict=True))
    assert by_age == {0.0: first, 0.5: first + 1, 2.0: reserved, 1.0: reserved}


def test_census_does_not_depend_on_the_order_of_the_training_rows(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = load_census(write(tmp_path / "a", TRAIN, TEST))
    other = load_census(write(tmp_path / "b", TRAIN[::-1], TEST))
    assert torch.equal(one.train.categorical, other.train.categorical.flip(0))
    assert torch.equal(one.test.categorical, other.test.categorical)


def test_census_says_where_to_get_missing_files(tmp_path: Path) -> None:
    write(tmp_path, TRAIN, TEST)
    (tmp_path / "census-income.test").unlink()
    with pytest.raises(FileNotFoundError, match=r"no census-income.test, .*UCI data set 117"):
        load_census(tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([TRAIN[0], "1, 2, 3"], r"census-income.data, line 2: expected 42 fields .* got 3"),
        ([], "census-income.data has no rows"),
        ([line(age="old")], "column age must hold finite numbers, got 'old'"),
        ([line(age="nan")], "column age must hold finite numbers, got 'nan'"),
    ],
)
def test_census_refuses_rows(tmp_path: Path, train: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_census(write(tmp_path, train, TEST))


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_census_names_a_damaged_file(tmp_path: Path, suffix: str, damage: str) -> None:
    write(tmp_path, TRAIN, TEST, suffix)
    path = tmp_path / f"census-income.test{suffix}"
    path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"not packed at all")
    with pytest.raises(ValueError, match=rf"census-income.test{suffix} is damaged"):
        load_census(tmp_path)


def test_census_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    assert len(load_census(write(tmp_path, [*TRAIN, "", " "], TEST)).train) == 3


@pytest.mark.slow
def test_census_as_published(shared_dir: Path) -> None:
    data = load_census(shared_dir / "data" / "census_income_kdd")
    assert sum(data.field_sizes) == 496
    assert (data.n_dense, len(data.field_sizes)) == (7, 32)
    assert [len(part) for part in parts(data)] == [199_523, 49_881, 49_881]
    income, marital = data.train.targets.double().mean(dim=0).tolist()
    assert (round(income, 4), round(marital, 4)) == (0.0621, 0.4335)
    for part in parts(data):
        assert part.dense.min() >= 0
        assert part.categorical.min() == 0
        assert part.categorical.max() < 496
    both = torch.cat([data.validation.targets, data.test.targets]).double().mean(dim=0)
    assert [round(x, 4) for x in both.tolist()] == [0.062, 0.4325]
    # Every known value occurs in training: no row of the table is without data.
    assert len(data.train.categorical.unique()) == 496


def test_digits_layout() -> None:
    data = load_digits(n_train=300, n_validation=50, n_test=60)
    assert [len(part) for part in parts(data)] == [300, 50, 60]
    assert data.n_dense == SIDE**2
    for part in parts(data):
        assert part.dense.min() >= 0
        assert part.dense.max() == 1
        assert part.categorical.shape == (len(part), 0)
        assert set(part.targets.unique().tolist()) == set(range(10))


def test_digits_pairs_are_overlays_of_real_digits() -> None:
    """Outside the overlap each corner of a pair is a digit of its label."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    data = load_digits(n_train=20, n_validation=1, n_test=1)
    canvas = data.train.dense.reshape(-1, SIDE, SIDE).numpy()
    for picture, (upper, lower) in zip(canvas, data.train.targets.tolist(), strict=True):
        ours = [picture[:SHIFT, :8], picture[-SHIFT:, -8:]]
        rows = [slice(0, SHIFT), slice(8 - SHIFT, 8)]
        for part, label, row in zip(ours, (upper, lower), rows, strict=True):
            images = bunch.images[bunch.target == label][:, row] / 16
            if row.start:  # the upper digit reaches into the lower one's first columns only
                part, images = part[:, 8 - SHIFT :], images[:, :, 8 - SHIFT :]
            else:
                part, images = part[:, :SHIFT], images[:, :, :SHIFT]
            assert np.isclose(images, part).all(axis=(1, 2)).any()


def test_digits_are_the_same_for_the_same_seed_only() -> None:
    sizes = {"n_train": 200, "n_validation": 20, "n_test": 20}
    assert_same(load_digits(3, **sizes), load_digits(3, **sizes))
    assert not torch.equal(load_digits(3, **sizes).train.dense, load_digits(4, **sizes).train.dense)


def test_tasks_losses_and_scores() -> None:
    target = torch.tensor([1, 0])
    binary, classes = Task("a"), Task("b", 3)
    assert float(binary.loss(torch.zeros(2), target)) == pytest.approx(np.log(2))
    assert float(classes.loss(torch.zeros(2, 3), target)) == pytest.approx(np.log(3))
    assert binary.score(torch.tensor([0.2, -1.0]), target) == 1.0
    assert classes.score(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), target) == 0.5
    assert (binary.metric, classes.metric) == ("AUC", "accuracy")


def test_split_refuses_parts_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="same number of rows"):
        Split(torch.empty(3, 1), torch.empty(2, 1), torch.empty(3, 2))


def test_split_rows_and_device() -> None:
    split = load_digits(n_train=10, n_validation=1, n_test=1).train
    picked = split.rows(torch.tensor([4, 4, 0]))
    assert torch.equal(picked.targets, split.targets[[4, 4, 0]])
    assert torch.equal(picked.to(torch.device("cpu")).dense, split.dense[[4, 4, 0]])
