"""The ops on GPUs: checks, then Triton kernels. Semantics: ops/__init__.py.

Every pass is one launch, but for two: with Clippy a Gram is three, as sigma is filled, then
lowered, then used; and apply_and_gram is two ops from T = 65 on (17 in float64, 33 where every
task keeps its own moments).

The checks look at shapes, dtypes, strides and devices only: nothing here reads the device's memory,
so no call waits for it. What `segments` says is taken as it is.

Raises on import:
    ImportError: Triton is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ...optim.rules import Hyper, Numbers
from .. import MAX_SOLVED_TASKS, perturbation

if importlib.util.find_spec("triton") is None:
    raise ImportError(
        "tensors on a GPU need Triton, which CUDA builds of torch bring along on Linux; "
        "install it with `pip install triton`"
    )
from . import apply as triton_apply
from . import bargaining as triton_bargaining
from . import clippy as triton_clippy
from . import combine as triton_combine
from . import control as triton_control
from . import gram as triton_gram
from . import mgda as triton_mgda
from . import perturb as triton_perturb
from .rules import N_STATES, NO_RULE

GRAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> None:
    """Refuse a tensor whose shape, dtype or device differs, or that is not contiguous."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_rows(name: str, tensor: Tensor) -> None:
    """Refuse what is not a matrix of contiguous rows that do not overlap."""
    rows, size = tensor.shape if tensor.dim() == 2 else (0, 0)
    if (
        tensor.dim() != 2
        or (size > 1 and tensor.stride(1) != 1)
        or (rows > 1 and tensor.stride(0) < size)
    ):
        raise ValueError(
            f"{name} must be (T, P) with contiguous rows that do not overlap, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def _check_grads(grads: Tensor) -> None:
    _check_rows("grads", grads)
    if grads.dtype not in GRAD_DTYPES:
        raise ValueError(f"grads must be one of {GRAD_DTYPES}, got {grads.dtype}")
    if grads.shape[0] == 0:
        raise ValueError("grads must have at least one row, got shape (0, P)")


def _check_update(kind: int, numbers: Tensor, grads: Tensor, state: Sequence[Tensor]) -> None:
    """What every pass over updates reads."""
    _check_grads(grads)
    n_tasks, size = grads.shape
    if not 0 <= kind < NO_RULE.value:
        raise ValueError(f"kind must be a Rule.kind, 0 to {NO_RULE.value - 1}, got {kind}")
    if len(state) != N_STATES[kind]:
        raise ValueError(
            f"state must hold {N_STATES[kind]} tensors for kind {kind}, got {len(state)}"
        )
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    per_task = state[0].dim() == 2
    for k, tensor in enumerate(state):
        if not per_task:
            _check(f"state[{k}]", tensor, (size,), dtype, grads)
            continue
        _check_rows(f"state[{k}]", tensor)
        if tensor.shape != grads.shape or tensor.dtype != dtype or tensor.device != grads.device:
            raise ValueError(
                f"state[{k}] must be {tuple(grads.shape)} {dtype} on {grads.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    rows = n_tasks if per_task else 1
    _check("numbers", numbers, (rows, len(Numbers._fields)), torch.float64, grads)


def _check_sigma(grads: Tensor, segments: Tensor | None, sigma: Tensor | None) -> None:
    if segments is None or sigma is None:
        missing = "segments" if segments is None else "sigma"
        raise ValueError(f"{missing} must be given with Clippy, got None")
    if segments.dim() != 1 or segments.shape[0] < 2:
        raise ValueError(f"segments must have shape (S + 1,), got {tuple(segments.shape)}")
    _check("segments", segments, (segments.shape[0],), torch.int64, grads)
    _check("sigma", sigma, (grads.shape[0], segments.shape[0] - 1), torch.float64, grads)


def _check_clippy(clippy: Sequence[float]) -> None:
    if len(clippy) != 2:
        raise ValueError(f"clippy must be (lambda_rel, lambda_abs), got {clippy}")


def _check_apply(grads: Tensor, params: Tensor, weights: Tensor, skip: Tensor | None) -> None:
    _check("params", params, (grads.shape[1],), grads.dtype, grads)
    _check("weights", weights, (grads.shape[0],), torch.float64, grads)
    if skip is not None:
        _check("skip", skip, (1,), torch.int32, grads)


def _check_gram(grads: Tensor, gram: Tensor) -> None:
    _check("gram", gram, (grads.shape[0], grads.shape[0]), torch.float64, grads)


def update_gram(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    gram: Tensor,
    *,
    clippy: Sequence[float] | None = None,
    params: Tensor | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
) -> None:
    """gram <- <u_i, u_j>, and sigma with Clippy."""
    _check_update(kind, numbers, grads, state)
    _check_gram(grads, gram)
    if clippy is None:
        triton_gram.update_gram(kind, numbers, grads, state, gram)
        return
    _check_clippy(clippy)
    _check_sigma(grads, segments, sigma)
    if params is None:
        raise ValueError("params must be given with Clippy, got None")
    _check("params", params, (grads.shape[1],), grads.dtype, grads)
    assert segments is not None
    assert sigma is not None
    triton_clippy.factors(kind, numbers, grads, state, params, segments, sigma, clippy)
    triton_gram.update_gram(kind, numbers, grads, state, gram, segments=segments, sigma=sigma)


def apply(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    weights: Tensor,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Parameters, then moments, one step with `weights`."""
    _check_update(kind, numbers, grads, state)
    _check_apply(grads, params, weights, skip)
    if sigma is not None:
        _check_sigma(grads, segments, sigma)
    triton_apply.apply(
        kind,
        numbers,
        grads,
        state,
        params,
        weights,
        segments=segments,
        sigma=sigma,
        skip=skip,
    )


def apply_and_gram(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    *,
    clippy: Sequence[float] | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """update_gram, and apply with the weights of an earlier one."""
    _check_update(kind, numbers, grads, state)
    _check_apply(grads, params, weights, skip)
    _check_gram(grads, gram)
    if clippy is not None:
        _check_clippy(clippy)
        _check_sigma(grads, segments, sigma)
        assert segments is not None
        assert sigma is not None
        triton_clippy.factors(kind, numbers, grads, state, params, segments, sigma, clippy)
    elif sigma is not None:
        raise ValueError("clippy must be given with sigma, got None")
    triton_gram.apply_and_gram(
        kind,
        numbers,
        grads,
        state,
        params,
        weights,
        gram,
        segments=segments,
        sigma=sigma,
        skip=skip,
    )


def gram(grads: Tensor, gram: Tensor) -> None:
    """gram <- <g_i, g_j>."""
    _check_grads(grads)
    _check_gram(grads, gram)
    triton_gram.gram(grads, gram)


def combine(grads: Tensor, weights: Tensor, out: Tensor) -> None:
    """out <- sum_i weights_i g_i."""
    _check_grads(grads)
    _check("weights", weights, (grads.shape[0],), torch.float64, grads)
    _check("out", out, (grads.shape[1],), grads.dtype, grads)
    triton_combine.combine(grads, weights, out)


def perturb(
    params: Tensor,
    out: Tensor,
    *,
    scale: Tensor,
    direction: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    distribution: str = "gaussian",
) -> None:
    """out_r <- params + scale_r u_r."""
    perturbation.check(params, out, scale, direction, seed, offset, distribution)
    triton_perturb.perturb(params, out, scale, direction, seed, offset, distribution)


def step_constants(
    hyper: Tensor, counts: Tensor, active: Tensor, numbers: Tensor, found: Tensor
) -> None:
    """numbers <- those of the next step."""
    rows = counts.shape[0]
    _check("counts", counts, (rows,), torch.int64, counts)
    _check("hyper", hyper, (rows, len(Hyper._fields)), torch.float64, counts)
    _check("active", active, (rows,), torch.int32, counts)
    _check("numbers", numbers, (rows, len(Numbers._fields)), torch.float64, counts)
    _check("found", found, (1,), torch.int32, counts)
    triton_control.step_constants(hyper, counts, active, numbers, found)


def count_step(counts: Tensor, active: Tensor, found: Tensor, tally: Tensor) -> None:
    """counts and tally go on by one step."""
    rows = counts.shape[0]
    _check("counts", counts, (rows,), torch.int64, counts)
    _check("active", active, (rows,), torch.int32, counts)
    _check("found", found, (1,), torch.int32, counts)
    _check("tally", tally, (2,), torch.int64, counts)
    triton_control.count_step(counts, active, found, tally)


def check(grads: Tensor, found: Tensor) -> None:
    """found <- 1 where grads hold what is not finite or too large."""
    _check_grads(grads)
    _check("found", found, (1,), torch.int32, grads)
    triton_control.check(grads, found)


def _check_solve(gram: Tensor, weights: Tensor, info: Tensor) -> None:
    tasks = gram.shape[0] if gram.dim() == 2 else 0
    if not 1 <= tasks <= MAX_SOLVED_TASKS:
        raise ValueError(
            f"gram must be (T, T) with 1 to {MAX_SOLVED_TASKS} tasks, got {tuple(gram.shape)}"
        )
    _check("gram", gram, (tasks, tasks), torch.float64, gram)
    _check("weights", weights, (tasks,), torch.float64, gram)
    _check("info", info, (4,), torch.float64, gram)


def bargaining(
    gram: Tensor,
    weights: Tensor,
    info: Tensor,
    *,
    preference: Tensor | None = None,
    tol: float = 1e-13,
    ridge: float = 0.0,
) -> None:
    """weights <- the a > 0 with a_i (gram a)_i = preference_i."""
    _check_solve(gram, weights, info)
    if preference is not None:
        _check("preference", preference, (gram.shape[0],), torch.float64, gram)
    triton_bargaining.bargaining(gram, weights, info, preference=preference, tol=tol, ridge=ridge)


def mgda(gram: Tensor, weights: Tensor, info: Tensor) -> None:
    """weights <- the point w of the simplex of least w' gram w."""
    _check_solve(gram, weights, info)
    triton_mgda.mgda(gram, weights, info)
