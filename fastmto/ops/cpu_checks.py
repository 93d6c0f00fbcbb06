"""Checks of the CPU ops' tensors; most return what the kernels take: addresses and sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..optim.rules import AdaGrad, Adam, Hyper, Numbers, RMSProp, Rule
from . import MAX_SOLVED_TASKS

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Columns of `numbers`.
NUMBERS = len(Numbers._fields)

_RULES: tuple[Rule, ...] = (
    Adam(),
    AdaGrad(),
    RMSProp(),
    RMSProp(momentum=0.5),
    RMSProp(centered=True),
    RMSProp(momentum=0.5, centered=True),
)
#: Number of the element formula -> names of its state tensors.
_STATES = {rule.kind: rule.state_names for rule in _RULES}

#: What the three passes over updates take first, in the order of `_kernels.update_gram`.
_Update = tuple[int, int, bool, int, int, int, int, int, int, int, int, int, int, int, int, int]


def _describe(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, "
        f"strides {tensor.stride()}, on {tensor.device}"
    )


def wrong(name: str, expected: str, tensor: Tensor) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {_describe(tensor)}")


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
    if (
        tensor.dtype is not dtype
        or tensor.shape != (numel,)
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        kind = str(dtype).removeprefix("torch.")
        raise wrong(name, f"a contiguous {kind} CPU tensor of shape ({numel},)", tensor)


def check_matrix(name: str, tensor: Tensor, rows: int, columns: int) -> None:
    if (
        tensor.dtype is not torch.float64
        or tensor.shape != (rows, columns)
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise wrong(name, f"a contiguous float64 CPU tensor of shape ({rows}, {columns})", tensor)


def check_grads(grads: Tensor) -> tuple[int, int, int, int]:
    """The number of the dtype, T, P and the row stride of grads."""
    dtype = DTYPES.get(grads.dtype)
    if dtype is None or grads.dim() != 2 or not grads.is_cpu:
        raise wrong("grads", "a (T, P) CPU tensor of float32, float64, bfloat16 or float16", grads)
    tasks, numel = grads.shape
    stride, along = grads.stride()
    if tasks < 1 or (numel > 1 and along != 1) or (tasks > 1 and stride < numel):
        raise wrong("grads", "(T >= 1, P) with contiguous rows that do not overlap", grads)
    return dtype, tasks, numel, stride


def check_segments(segments: Tensor, numel: int) -> int:
    """The number S of tensors. Their borders are read: they decide what memory is touched."""
    if (
        segments.dtype is not torch.int64
        or segments.dim() != 1
        or segments.numel() < 2
        or not segments.is_contiguous()
        or not segments.is_cpu
    ):
        raise wrong("segments", "a contiguous int64 CPU tensor of shape (S + 1,)", segments)
    first, last = int(segments[0]), int(segments[-1])
    if first != 0 or last != numel or not bool((segments[1:] >= segments[:-1]).all()):
        raise ValueError(
            f"segments must rise from 0 to P = {numel}, got {first} to {last}"
            + ("" if first != 0 or last != numel else ", not sorted")
        )
    return segments.numel() - 1


def check_update(
    kind: int, numbers: Tensor, grads: Tensor, state: list[Tensor], isa: int
) -> _Update:
    dtype, tasks, numel, stride = check_grads(grads)
    names = _STATES.get(kind)
    if names is None:
        raise ValueError(f"kind must be a rule's, from 0 to {max(_STATES)}, got {kind!r}")
    if len(state) != len(names):
        raise ValueError(
            f"state must hold {len(names)} tensors ({', '.join(names)}), got {len(state)}"
        )
    maths = torch.float64 if dtype == 1 else torch.float32
    addresses = [0, 0, 0, 0, 0, 0]
    per_task = state[0].dim() == 2
    for k, tensor in enumerate(state):
        if per_task:
            if (
                tensor.dtype is not maths
                or tensor.shape != (tasks, numel)
                or (numel > 1 and tensor.stride(1) != 1)
                or (tasks > 1 and tensor.stride(0) < numel)
                or not tensor.is_cpu
            ):
                dtype_name = str(maths).removeprefix("torch.")
                expected = (
                    f"a {dtype_name} CPU tensor of shape ({tasks}, {numel}) with contiguous rows "
                    "that do not overlap"
                )
                raise wrong(f"state[{k}] ({names[k]})", expected, tensor)
            addresses[2 * k + 1] = tensor.stride(0)
        elif (
            tensor.dtype is not maths
            or tensor.shape != (numel,)
            or not tensor.is_contiguous()
            or not tensor.is_cpu
        ):
            check_vector(f"state[{k}] ({names[k]})", tensor, maths, numel)
        addresses[2 * k] = tensor.data_ptr()
    check_matrix("numbers", numbers, tasks if per_task else 1, NUMBERS)
    a, b, c, d, e, f = addresses
    return (
        kind,
        dtype,
        per_task,
        tasks,
        numel,
        grads.data_ptr(),
        stride,
        numbers.data_ptr(),
        a,
        b,
        c,
        d,
        e,
        f,
        torch.get_num_threads(),
        isa,
    )


def check_table(hyper: Tensor, counts: Tensor, numbers: Tensor) -> int:
    """The number of rows of what `step_constants` reads and writes."""
    rows = counts.numel()
    check_matrix("hyper", hyper, rows, len(Hyper._fields))
    check_vector("counts", counts, torch.int64, rows)
    check_matrix("numbers", numbers, rows, NUMBERS)
    return rows


def check_skip(skip: Tensor | None) -> int:
    """The address of skip, 0 for None."""
    if skip is None:
        return 0
    check_vector("skip", skip, torch.int32, 1)
    return skip.data_ptr()


def check_problem(gram: Tensor, weights: Tensor, info: Tensor) -> int:
    """The number of tasks of a solver's problem."""
    tasks = gram.shape[0] if gram.dim() == 2 else 0
    if not 1 <= tasks <= MAX_SOLVED_TASKS:
        raise wrong("gram", f"(T, T) with T from 1 to {MAX_SOLVED_TASKS}", gram)
    check_matrix("gram", gram, tasks, tasks)
    check_vector("weights", weights, torch.float64, tasks)
    check_vector("info", info, torch.float64, 4)
    return tasks
