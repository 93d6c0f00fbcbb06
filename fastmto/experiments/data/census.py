"""Census-Income KDD as a two-task ranking problem, read from the files as published.

Source: UCI Machine Learning Repository, data set 117, "Census-Income (KDD)": census-income.data
(199,523 rows) and census-income.test (99,762), 42 columns, no header, fields separated by ", ".
Protocol: the MMOE literature's pair of tasks (Ma et al., KDD 2018): income over 50,000 and never
married.
"""

from __future__ import annotations

import bz2
import gzip
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .base import MultiTaskData, Split, Task

COLUMNS = (
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour",
    "hs_college", "marital_stat", "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex",
    "union_member", "unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses",
    "stock_dividends", "tax_filer_stat", "region_prev_res", "state_prev_res", "det_hh_fam_stat",
    "det_hh_summ", "instance_weight", "mig_chg_msa", "mig_chg_reg", "mig_move_reg", "mig_same",
    "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father", "country_mother",
    "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked",
    "year", "income_50k",
)  # fmt: skip
DENSE = (
    "age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp",
    "weeks_worked",
)  # fmt: skip
#: Label columns and the value that counts as positive.
LABELS = {"income_50k": "50000+.", "marital_stat": "Never married"}
#: A survey weight, not a property of a person.
DROPPED = ("instance_weight",)
CATEGORICAL = tuple(name for name in COLUMNS if name not in {*DENSE, *LABELS, *DROPPED})

SOURCE = (
    'Get "Census-Income (KDD)", UCI data set 117, from '
    "https://archive.ics.uci.edu/dataset/117/census+income+kdd and unpack it there "
    "(census-income.data and census-income.test, plain, .gz or .bz2)."
)
_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
}
#: Lines split at once: small enough to stay in the cache.
_CHUNK = 4096


@dataclass(frozen=True)
class _Column:
    """A column as codes (N,) into its distinct values, in the order of first appearance."""

    codes: npt.NDArray[np.int32]
    values: list[str]

    def map(self, function: Callable[[str], float]) -> npt.NDArray[np.float64]:
        """`function` of every row's value, called once a distinct value."""
        table = np.array([function(value) for value in self.values], dtype=np.float64)
        result: npt.NDArray[np.float64] = table[self.codes]
        return result


def _find(root: Path, name: str) -> Path:
    """The file `name` in `root`, plain or packed."""
    for suffix in _UNPACK:
        path = root / (name + suffix)
        if path.is_file():
            return path
    raise FileNotFoundError(f"no {name}, {name}.gz or {name}.bz2 in {root}. {SOURCE}")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _UNPACK.get(path.suffix, bytes)(content)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _parse(content: bytes, path: Path) -> dict[str, _Column]:
    """Splits the lines of one file into coded columns, `DROPPED` ones left out.

    Raises:
        ValueError: no rows, or a row without exactly 42 fields, named by file and line.
    """
    lines = content.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path} has no rows")
    codes = [array("i") for _ in COLUMNS]
    # A new value gets the next number; looking a value up is then one dictionary access.
    tables: list[defaultdict[bytes, int]] = [defaultdict(count().__next__) for _ in COLUMNS]
    kept = [i for i, name in enumerate(COLUMNS) if name not in DROPPED]
    for start in range(0, len(lines), _CHUNK):
        rows = [line.split(b",") for line in lines[start : start + _CHUNK]]
        for number, row in enumerate(rows, start + 1):
            if len(row) != len(COLUMNS):
                raise ValueError(
                    f"{path}, line {number}: expected {len(COLUMNS)} fields separated by commas, "
                    f"got {len(row)}"
                )
        columns = list(zip(*rows, strict=True))
        for i in kept:
            codes[i].extend(map(tables[i].__getitem__, columns[i]))
    return {
        COLUMNS[i]: _Column(
            np.frombuffer(codes[i], dtype=np.int32),
            # Only the space after the comma goes: some published values end in one.
            [value.decode("utf-8").removeprefix(" ") for value in tables[i]],
        )
        for i in kept
    }


def _number(path: Path, name: str) -> Callable[[str], float]:
    def number(value: str) -> float:
        try:
            result = float(value)
        except ValueError:
            result = float("nan")
        if not np.isfinite(result):
            raise ValueError(f"{path}: column {name} must hold finite numbers, got {value!r}")
        return result

    return number


def _targets(columns: dict[str, _Column]) -> npt.NDArray[np.int64]:
    labels = [
        columns[name].map(lambda value, positive=positive: value == positive)  # type: ignore[misc]
        for name, positive in LABELS.items()
    ]
    return np.stack(labels, axis=1).astype(np.int64)


def load_census(root: str | Path) -> MultiTaskData:
    """Reads both published files and applies the protocol.

    Seven dense columns, scaled to [0, 1] by the minimum and maximum of the training part (a test
    value may lie outside); 32 categorical columns whose known values are those of the training
    part, in sorted order, numbered through all fields; every value that training never saw gets
    the one id after the last. The published test part is cut at random 1:1 into validation and
    test, the same cut on every call, so that runs with different seeds compare.

    Args:
        root: the folder that holds census-income.data and census-income.test, each plain, .gz or
            .bz2.

    Returns:
        Tasks "income" (50,000 dollars and more) and "marital" (never married), 496 known
        categorical values in the published files.

    Raises:
        FileNotFoundError: a file is absent; the message says where to get it.
        ValueError: a file is damaged or not in the published format.
    """
    root = Path(root)
    paths = [_find(root, name) for name in ("census-income.data", "census-income.test")]
    # Unpacking releases the interpreter's lock, and takes as long as parsing.
    with ThreadPoolExecutor(len(paths)) as pool:
        contents = list(pool.map(_read, paths))
    parts = [_parse(content, path) for content, path in zip(contents, paths, strict=True)]

    n_rows = [len(part["age"].codes) for part in parts]
    dense = [np.empty((n, len(DENSE)), dtype=np.float32) for n in n_rows]
    for j, name in enumerate(DENSE):
        numbers = [
            part[name].map(_number(path, name)) for part, path in zip(parts, paths, strict=True)
        ]
        low, high = numbers[0].min(), numbers[0].max()
        for out, values in zip(dense, numbers, strict=True):
            out[:, j] = (values - low) / (high - low if high > low else 1.0)

    field_sizes = tuple(len(parts[0][name].values) for name in CATEGORICAL)
    reserved = sum(field_sizes)
    categorical = [np.empty((n, len(CATEGORICAL)), dtype=np.int32) for n in n_rows]
    offset = 0
    for j, name in enumerate(CATEGORICAL):
        ids = {value: offset + i for i, value in enumerate(sorted(parts[0][name].values))}
        for rows, part in zip(categorical, parts, strict=True):
            rows[:, j] = part[name].map(lambda value, ids=ids: ids.get(value, reserved))  # type: ignore[misc]
        offset += len(ids)

    train, rest = (
        Split(torch.from_numpy(d), torch.from_numpy(c), torch.from_numpy(_targets(part)))
        for d, c, part in zip(dense, categorical, parts, strict=True)
    )
    order = torch.from_numpy(np.random.default_rng(117).permutation(len(rest)))
    half = len(rest) // 2
    return MultiTaskData(
        name="census",
        tasks=(Task("income"), Task("marital")),
        field_sizes=field_sizes,
        train=train,
        validation=rest.rows(order[:half]),
        test=rest.rows(order[half:]),
    )
