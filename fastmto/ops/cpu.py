"""The ops on the CPU: checks, then the compiled kernels (csrc/kernels) on raw addresses.

The semantics are the docstring of `fastmto.ops`. Every function here takes a private `isa` (0 the
best of this machine, 1 baseline, 2 x86-64-v3, 3 x86-64-v4) for tests and benches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import solvers
from . import _kernels, perturbation
from .cpu_checks import (
    DTYPES,
    check_grads,
    check_matrix,
    check_problem,
    check_segments,
    check_skip,
    check_table,
    check_update,
    check_vector,
    wrong,
)

_STATUSES = {name: float(number) for number, name in enumerate(solvers.STATUSES)}


def update_gram(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: list[Tensor],
    gram: Tensor,
    *,
    clippy: Sequence[float] | None = None,
    params: Tensor | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    isa: int = 0,
) -> None:
    """gram_ij = <u_i, u_j>, and sigma with Clippy; see `fastmto.ops`."""
    update = check_update(kind, numbers, grads, state, isa)
    tasks, numel = update[3], update[4]
    check_matrix("gram", gram, tasks, tasks)
    if clippy is None:
        _kernels.update_gram(*update, gram.data_ptr())
        return
    if params is None or segments is None or sigma is None:
        raise ValueError("params, segments and sigma must be given with clippy")
    lambda_rel, lambda_abs = clippy
    check_vector("params", params, grads.dtype, numel)
    n_segments = check_segments(segments, numel)
    check_matrix("sigma", sigma, tasks, n_segments)
    _kernels.update_gram_clipped(
        *update,
        gram.data_ptr(),
        lambda_rel,
        lambda_abs,
        params.data_ptr(),
        segments.data_ptr(),
        n_segments,
        sigma.data_ptr(),
    )


def apply(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: list[Tensor],
    params: Tensor,
    weights: Tensor,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
    isa: int = 0,
) -> None:
    """The step of parameters and moments; see `fastmto.ops`."""
    update = check_update(kind, numbers, grads, state, isa)
    tasks, numel = update[3], update[4]
    check_vector("params", params, grads.dtype, numel)
    check_vector("weights", weights, torch.float64, tasks)
    moved = params.data_ptr(), weights.data_ptr(), check_skip(skip)
    if sigma is None:
        _kernels.apply(*update, *moved, 0, 0, 0)
        return
    if segments is None:
        raise ValueError("segments must be given with sigma")
    n_segments = check_segments(segments, numel)
    check_matrix("sigma", sigma, tasks, n_segments)
    _kernels.apply(*update, *moved, segments.data_ptr(), n_segments, sigma.data_ptr())


def apply_and_gram(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: list[Tensor],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    *,
    clippy: Sequence[float] | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
    isa: int = 0,
) -> None:
    """update_gram and apply; see `fastmto.ops`.

    With Clippy a tensor's factor is known only at its end, so that makes two passes; the factors
    are this step's, and stand in `sigma` afterwards. The results have the bits of `update_gram` and
    `apply` called one after the other.
    """
    update = check_update(kind, numbers, grads, state, isa)
    tasks, numel = update[3], update[4]
    check_vector("params", params, grads.dtype, numel)
    check_vector("weights", weights, torch.float64, tasks)
    check_matrix("gram", gram, tasks, tasks)
    skip_address = check_skip(skip)
    if clippy is None:
        if sigma is not None:
            raise ValueError("clippy must be given with sigma")
        _kernels.apply_and_gram(
            *update, params.data_ptr(), weights.data_ptr(), skip_address, gram.data_ptr()
        )
        return
    head = kind, numbers, grads, state
    update_gram(*head, gram, clippy=clippy, params=params, segments=segments, sigma=sigma, isa=isa)
    apply(*head, params, weights, segments=segments, sigma=sigma, skip=skip, isa=isa)


def gram(grads: Tensor, gram: Tensor, *, isa: int = 0) -> None:
    """gram_ij = <g_i, g_j>; see `fastmto.ops`."""
    dtype, tasks, numel, stride = check_grads(grads)
    check_matrix("gram", gram, tasks, tasks)
    _kernels.gram(
        dtype,
        tasks,
        numel,
        grads.data_ptr(),
        stride,
        gram.data_ptr(),
        torch.get_num_threads(),
        isa,
    )


def combine(grads: Tensor, weights: Tensor, out: Tensor, *, isa: int = 0) -> None:
    """out = sum_i weights_i g_i; see `fastmto.ops`."""
    dtype, tasks, numel, stride = check_grads(grads)
    check_vector("weights", weights, torch.float64, tasks)
    check_vector("out", out, grads.dtype, numel)
    _kernels.combine(
        dtype,
        tasks,
        numel,
        grads.data_ptr(),
        stride,
        weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
        isa,
    )


def perturb(
    params: Tensor,
    out: Tensor,
    *,
    scale: Tensor,
    direction: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    distribution: str = "gaussian",
    isa: int = 0,
) -> None:
    """out_r = params + scale_r u_r; see `fastmto.ops`."""
    if not params.is_cpu:
        raise wrong("params", "on the CPU", params)
    perturbation.check(params, out, scale, direction, seed, offset, distribution)
    _kernels.perturb(
        DTYPES[params.dtype],
        len(out),
        params.numel(),
        params.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        scale.data_ptr(),
        0 if seed is None else 1 + perturbation.DISTRIBUTIONS.index(distribution),
        0 if direction is None else direction.data_ptr(),
        direction.stride(0) if direction is not None and direction.dim() == 2 else 0,
        0 if seed is None else seed,
        0 if seed is None else offset,
        torch.get_num_threads(),
        isa,
    )


def check(grads: Tensor, found: Tensor, *, isa: int = 0) -> None:
    """found = 1 where an element is NaN, infinite or too large to be squared; see `fastmto.ops`."""
    dtype, tasks, numel, stride = check_grads(grads)
    check_vector("found", found, torch.int32, 1)
    threads = torch.get_num_threads()
    if not _kernels.all_finite(dtype, tasks, numel, grads.data_ptr(), stride, threads, isa):
        found.fill_(1)


def step_constants(
    hyper: Tensor, counts: Tensor, active: Tensor, numbers: Tensor, found: Tensor
) -> None:
    """numbers of the next step, with the bits of `Rule.numbers`; see `fastmto.ops`."""
    rows = check_table(hyper, counts, numbers)
    check_vector("active", active, torch.int32, rows)
    check_vector("found", found, torch.int32, 1)
    _kernels.step_constants(
        rows,
        hyper.data_ptr(),
        counts.data_ptr(),
        active.data_ptr(),
        numbers.data_ptr(),
        found.data_ptr(),
    )


def count_step(counts: Tensor, active: Tensor, found: Tensor, tally: Tensor) -> None:
    """The step counts after a step that was taken or skipped; see `fastmto.ops`."""
    rows = counts.numel()
    check_vector("counts", counts, torch.int64, rows)
    check_vector("active", active, torch.int32, rows)
    check_vector("found", found, torch.int32, 1)
    check_vector("tally", tally, torch.int64, 2)
    _kernels.count_step(
        rows, counts.data_ptr(), active.data_ptr(), found.data_ptr(), tally.data_ptr()
    )


def bargaining(
    gram: Tensor,
    weights: Tensor,
    info: Tensor,
    *,
    preference: Tensor | None = None,
    tol: float = 1e-13,
    ridge: float = 0.0,
) -> None:
    """The bargaining weights, if there are any; see `fastmto.ops`."""
    tasks = check_problem(gram, weights, info)
    if preference is not None:
        check_vector("preference", preference, torch.float64, tasks)
    powers = None if preference is None else preference.numpy()
    _tell(solvers.bargaining(gram, preference=powers, tol=tol, ridge=ridge), weights, info)


def mgda(gram: Tensor, weights: Tensor, info: Tensor) -> None:
    """The point of the simplex of least norm; see `fastmto.ops`."""
    check_problem(gram, weights, info)
    _tell(solvers.mgda(gram), weights, info)


def _tell(result: solvers.Result[Tensor], weights: Tensor, info: Tensor) -> None:
    if result.weights is not None:
        weights.copy_(result.weights)
    status = _STATUSES[result.status]
    info.numpy()[:] = status, result.iterations, result.residual, result.kappa
