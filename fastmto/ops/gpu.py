"""The ops on NVIDIA GPUs.

The passes of the three rules and those without a rule are Triton kernels, one launch each. Clippy
(`clippy` or `sigma` given) and AdaTask (state of shape (T, P)) run on plain torch operations,
eager.py; which of the two serves a call depends on these arguments alone. Semantics:
ops/__init__.py.

Raises on import:
    ImportError: Triton is not installed.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..rules import Clippy, Hyper, Numbers, Rule
from . import MAX_SOLVED_TASKS, Steps, eager, perturbation

if importlib.util.find_spec("triton") is None:
    raise ImportError(
        "tensors on a GPU need Triton, which CUDA builds of torch bring along on Linux; "
        "install it with `pip install triton`"
    )
from . import (
    triton_apply,
    triton_bargaining,
    triton_combine,
    triton_control,
    triton_mgda,
    triton_perturb,
    triton_search,
)

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
        raise ValueError(f"{name} must be on {like.device} like grads, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_rows(name: str, tensor: Tensor) -> None:
    """Refuse what is not a matrix of contiguous rows."""
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} must be (T, P) with contiguous rows, "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def _check_grads(grads: Tensor) -> None:
    _check_rows("grads", grads)
    if grads.dtype not in GRAD_DTYPES:
        raise ValueError(f"grads must be one of {GRAD_DTYPES}, got {grads.dtype}")
    if len(grads) == 0:
        raise ValueError("grads must have at least one row, got shape (0, P)")


def _check_state(rule: Rule, step: Steps, grads: Tensor, state: tuple[Tensor, ...]) -> None:
    n_tasks, size = grads.shape
    if len(state) != len(rule.state_names):
        raise ValueError(f"state must hold {rule.state_names}, got {len(state)} tensors")
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    for name, tensor in zip(rule.state_names, state, strict=True):
        if isinstance(step, int):
            _check(f"state {name}", tensor, (size,), dtype, grads)
            continue
        _check_rows(f"state {name}", tensor)
        if tensor.shape != grads.shape or tensor.dtype != dtype or tensor.device != grads.device:
            raise ValueError(
                f"state {name} must be {tuple(grads.shape)} {dtype} on {grads.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if isinstance(step, int):
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}")
    elif len(step) != n_tasks or min(step) < 0:
        raise ValueError(f"step must hold {n_tasks} numbers >= 0, got {step}")


def _check_clippy(
    grads: Tensor, params: Tensor | None, segments: Tensor | None, sigma: Tensor | None
) -> None:
    """What Clippy's factors need: all of these, and segments that cover P in order."""
    missing = [
        name
        for name, value in (("params", params), ("segments", segments), ("sigma", sigma))
        if value is None
    ]
    if params is None or segments is None or sigma is None:
        raise ValueError(f"Clippy needs params, segments and sigma, got no {', '.join(missing)}")
    n_tasks, size = grads.shape
    if segments.device.type != "cpu" or segments.dtype != torch.int64 or segments.dim() != 1:
        raise ValueError(
            "segments must be (S+1,) int64 on the CPU, "
            f"got {tuple(segments.shape)} {segments.dtype} on {segments.device}"
        )
    bounds = segments.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != size or bounds != sorted(bounds):
        raise ValueError(f"segments must rise from 0 to {size}, got {bounds}")
    _check("sigma", sigma, (n_tasks, len(bounds) - 1), torch.float64, grads)


def _check_apply(grads: Tensor, params: Tensor, weights: Tensor) -> None:
    _check("params", params, (grads.shape[1],), grads.dtype, grads)
    _check("weights", weights, (len(grads),), torch.float64, grads)


def search(
    rule: Rule,
    step: Steps,
    grads: Tensor,
    state: tuple[Tensor, ...],
    gram: Tensor,
    *,
    clippy: Clippy | None = None,
    params: Tensor | None = None,
    lr: float = 0.0,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
) -> None:
    """gram <- <u_i, u_j>."""
    _check_grads(grads)
    _check_state(rule, step, grads, state)
    _check("gram", gram, (len(grads), len(grads)), torch.float64, grads)
    if clippy is not None:
        _check_clippy(grads, params, segments, sigma)
    if clippy is None and isinstance(step, int):
        triton_search.search(rule, step, grads, state, gram)
    else:
        eager.search(
            rule,
            step,
            grads,
            state,
            gram,
            clippy=clippy,
            params=params,
            lr=lr,
            segments=segments,
            sigma=sigma if clippy is not None else None,
        )


def apply(
    rule: Rule,
    step: Steps,
    grads: Tensor,
    state: tuple[Tensor, ...],
    params: Tensor,
    weights: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
) -> None:
    """Parameters, then moments, one step with `weights`."""
    _check_grads(grads)
    _check_state(rule, step, grads, state)
    _check_apply(grads, params, weights)
    if sigma is not None:
        _check_clippy(grads, params, segments, sigma)
    if sigma is None and isinstance(step, int):
        triton_apply.apply(rule, step, grads, state, params, weights, lr, weight_decay)
    else:
        eager.apply(
            rule,
            step,
            grads,
            state,
            params,
            weights,
            lr,
            weight_decay,
            segments=segments,
            sigma=sigma,
        )


def delayed(
    rule: Rule,
    step: Steps,
    grads: Tensor,
    state: tuple[Tensor, ...],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    *,
    clippy: Clippy | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
) -> None:
    """Search and apply with the weights of an earlier search."""
    _check_grads(grads)
    _check_state(rule, step, grads, state)
    _check_apply(grads, params, weights)
    _check("gram", gram, (len(grads), len(grads)), torch.float64, grads)
    if clippy is not None:
        _check_clippy(grads, params, segments, sigma)
    elif sigma is not None:
        raise ValueError("clippy must be given with sigma, got None")
    if clippy is None and isinstance(step, int):
        triton_search.delayed(rule, step, grads, state, params, weights, gram, lr, weight_decay)
    else:
        eager.delayed(
            rule,
            step,
            grads,
            state,
            params,
            weights,
            gram,
            lr,
            weight_decay,
            clippy=clippy,
            segments=segments,
            sigma=sigma,
        )


def gram(grads: Tensor, gram: Tensor) -> None:
    """gram <- <g_i, g_j>."""
    _check_grads(grads)
    _check("gram", gram, (len(grads), len(grads)), torch.float64, grads)
    triton_search.gram(grads, gram)


def combine(grads: Tensor, weights: Tensor, out: Tensor) -> None:
    """out <- sum_i weights_i g_i."""
    _check_grads(grads)
    _check("weights", weights, (len(grads),), torch.float64, grads)
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


def clock(hyper: Tensor, counts: Tensor, active: Tensor, numbers: Tensor, found: Tensor) -> None:
    """numbers <- those of the next step."""
    rows = len(counts)
    _check("counts", counts, (rows,), torch.int64, counts)
    _check("hyper", hyper, (rows, len(Hyper._fields)), torch.float64, counts)
    _check("active", active, (rows,), torch.int32, counts)
    _check("numbers", numbers, (rows, len(Numbers._fields)), torch.float64, counts)
    _check("found", found, (1,), torch.int32, counts)
    triton_control.clock(hyper, counts, active, numbers, found)


def advance(counts: Tensor, active: Tensor, found: Tensor, tally: Tensor) -> None:
    """counts and tally go on by one step."""
    rows = len(counts)
    _check("counts", counts, (rows,), torch.int64, counts)
    _check("active", active, (rows,), torch.int32, counts)
    _check("found", found, (1,), torch.int32, counts)
    _check("tally", tally, (2,), torch.int64, counts)
    triton_control.advance(counts, active, found, tally)


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
        _check("preference", preference, (len(gram),), torch.float64, gram)
    triton_bargaining.bargaining(gram, weights, info, preference=preference, tol=tol, ridge=ridge)


def mgda(gram: Tensor, weights: Tensor, info: Tensor) -> None:
    """weights <- the point w of the simplex of least w' gram w."""
    _check_solve(gram, weights, info)
    triton_mgda.mgda(gram, weights, info)
