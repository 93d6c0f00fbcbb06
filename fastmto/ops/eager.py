"""The ops in plain torch operations: right on any device, at the price of memory and launches.

Serves the GPU backend for Clippy and AdaTask, which have no Triton kernels yet. Semantics are the
contract's (ops/__init__.py); arguments are taken as checked. The element formulas are those of
reference.py, run in the contract's working precision (float32, or float64 for float64 inputs);
Gram sums are float64 throughout. Updates of a search are stored, (T, P) in the working precision;
nothing waits for the device but `all_finite`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..philox import DISTRIBUTIONS
from ..reference import State, advance
from ..rules import Clippy, Rule
from . import Steps

#: Coordinates whose updates are held in float64 at a time when the Gram is summed.
GRAM_BLOCK = 1 << 16


def _working(tensor: Tensor) -> Tensor:
    """`tensor` in the precision of the maths."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros in the precision of the maths."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(shape, dtype=dtype, device=like.device)


def _steps(step: Steps, n_tasks: int) -> list[int]:
    return [step] * n_tasks if isinstance(step, int) else list(step)


def _state_of(rule: Rule, state: tuple[Tensor, ...], task: int) -> State:
    """Views of the moments that task `task` uses."""
    return {
        name: tensor if tensor.dim() == 1 else tensor[task]
        for name, tensor in zip(rule.state_names, state, strict=True)
    }


def _factors(clippy: Clippy, lr: float, theta: Tensor, u: Tensor, bounds: list[int]) -> Tensor:
    """Clippy's sigma of every tensor, (S,): where lr u = 0 the ratio is infinite, sigma 1."""
    ratios = (clippy.lambda_rel * theta.abs() + clippy.lambda_abs) / (lr * u.abs())
    smallest = [
        ratios[lo:hi].amin() if hi > lo else ratios.new_tensor(1.0) for lo, hi in pairwise(bounds)
    ]
    return torch.stack(smallest).clamp(max=1.0)


def _shrunk(u: Tensor, sigma: Tensor, bounds: list[int]) -> Tensor:
    """sigma_s u on every tensor s; not in place, as u may be the new momentum buffer too."""
    pieces = [
        factor * u[lo:hi] for factor, (lo, hi) in zip(sigma.unbind(), pairwise(bounds), strict=True)
    ]
    return torch.cat(pieces)


def _gram_of(rows: Tensor, gram: Tensor) -> None:
    """gram_ij = <rows_i, rows_j>, summed in float64."""
    total = torch.zeros_like(gram)
    for block in torch.split(rows, GRAM_BLOCK, dim=1):
        wide = block.double()
        total += wide @ wide.T
    gram.copy_(total.tril() + total.tril(-1).T)


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
    """The contract's `search`; the rows of absent tasks are 0 and their sigma 1."""
    n_tasks, size = grads.shape
    updates = _zeros(grads, n_tasks, size)
    if sigma is not None:
        sigma.fill_(1.0)
    for i, t in enumerate(_steps(step, n_tasks)):
        if t == 0:
            continue
        u, new = advance(rule, t, _working(grads[i]), _state_of(rule, state, i))
        for moments in new.values():
            u = u + (moments - moments)  # an infinite square shows as NaN, not as an update of 0
        if clippy is not None:
            assert params is not None
            assert segments is not None
            assert sigma is not None
            bounds = segments.tolist()
            sigma[i] = _factors(clippy, lr, _working(params), u, bounds)
            u = _shrunk(u, sigma[i], bounds)
        updates[i] = u
    _gram_of(updates, gram)


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
    """The contract's `apply`."""
    n_tasks, size = grads.shape
    joint, total = _zeros(grads, size), _zeros(grads, size)
    for i, t in enumerate(_steps(step, n_tasks)):
        if t == 0:
            continue
        g, old, a = _working(grads[i]), _state_of(rule, state, i), weights[i]
        u, new = advance(rule, t, g, old)
        if sigma is not None:
            assert segments is not None
            u = _shrunk(u, sigma[i], segments.tolist())
        joint += torch.where(a != 0, a * u, 0.0)
        if isinstance(step, int):
            total += torch.where(a != 0, a * g, 0.0)
        else:
            for name, tensor in old.items():
                tensor.copy_(new[name])
    if isinstance(step, int):
        old = _state_of(rule, state, 0)
        _, new = advance(rule, step, total, old)
        for name, tensor in old.items():
            tensor.copy_(new[name])
    params.copy_((1 - lr * weight_decay) * _working(params) - lr * joint)


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
    """The contract's `delayed`, as the two passes one after the other."""
    search(
        rule,
        step,
        grads,
        state,
        gram,
        clippy=clippy,
        params=params,
        lr=lr,
        segments=segments,
        sigma=sigma,
    )
    apply(
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


def gram(grads: Tensor, gram: Tensor) -> None:
    """The contract's `gram`."""
    _gram_of(grads, gram)
    if grads.shape[1] == 0:
        return
    for end in torch.aminmax(grads, dim=1):
        square = _working(end) ** 2
        gram.diagonal().add_(square - square)  # NaN: float64 holds squares that the maths does not


def combine(grads: Tensor, weights: Tensor, out: Tensor) -> None:
    """The contract's `combine`."""
    total = _zeros(grads, grads.shape[1])
    for a, g in zip(weights.unbind(), grads, strict=True):
        total += torch.where(a != 0, a * _working(g), 0.0)
    out.copy_(total)


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
    """The contract's `perturb`; a random direction is stored while its row is written."""
    for r, factor in enumerate(scale.to(params.dtype).unbind()):
        if seed is not None:
            drawn = DISTRIBUTIONS[distribution](seed, offset + r, params.numel())
            u = torch.from_numpy(drawn).to(params)
        else:
            assert direction is not None
            u = direction if direction.dim() == 1 else direction[r]
        torch.add(params, factor * u, out=out[r])


def all_finite(tensor: Tensor) -> bool:
    """The contract's `all_finite`: both ends of the range are NaN if any element is."""
    limit = 2.0**511 if tensor.dtype == torch.float64 else 2.0**63
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool((low.double() > -limit) & (high.double() < limit))
