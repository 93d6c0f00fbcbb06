"""The maths of the passes in plain torch, what `bench/gpu.py` compares the kernels with.

Vectors come as (25, n, 64), 25 tensors of the same size one after the other, and gradients as
(T, 25, n, 64): a compiled function then serves every n and still knows that rows start at multiples
of 16 bytes. Each form is written as suits it best: eager for few large operations and matrix
products, fused (for torch.compile) for sums that can run along with what they sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastmto.ops.rules import Adam, Clippy

RULE, STEP, LR = Adam(), 7, 1e-3
CLIPPY = Clippy()
#: Parameter tensors that the P coordinates are cut into.
SEGMENTS = 25
#: Elements of the innermost dimension of a view.
INNER = 64
#: Up to so many tasks the fused Gram is a sum a pair of tasks; from then on a matrix product.
PAIRS_UP_TO = 3

C = RULE.coefficients(STEP)


def as_view(x: Tensor) -> Tensor:
    """(P,) -> (25, n, 64), (T, P) -> (T, 25, n, 64); no copy."""
    return x.view(*x.shape[:-1], SEGMENTS, -1, INNER)


def _update(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    m_i = C.b1 * m + (1 - C.b1) * g
    v_i = C.b2 * v + (1 - C.b2) * g * g
    return C.c1 * m_i / (C.c2 * v_i.sqrt() + C.eps)


def _gram(x: Tensor, fused: bool) -> Tensor:
    n = len(x)
    if fused and n <= PAIRS_UP_TO:
        pair = {(i, j): (x[i] * x[j]).sum() for i in range(n) for j in range(i, n)}
        return torch.stack([pair[min(i, j), max(i, j)] for i in range(n) for j in range(n)]).view(
            n, n
        )
    rows = x.flatten(1)
    return rows @ rows.T


def _weighted(a: Tensor, x: Tensor, fused: bool) -> Tensor:
    if fused:
        return (a.view(-1, 1, 1, 1) * x).sum(0)
    return (a @ x.flatten(1)).view(x.shape[1:])


def _factors(u: Tensor, theta: Tensor) -> Tensor:
    allowed = CLIPPY.lambda_rel * theta.abs() + CLIPPY.lambda_abs
    return (allowed / (LR * u.abs())).amin((2, 3)).clamp(max=1.0)


def _scaled(sigma: Tensor, u: Tensor) -> Tensor:
    return sigma[:, :, None, None] * u


def _move(
    g: Tensor, m: Tensor, v: Tensor, theta: Tensor, a: Tensor, u: Tensor, fused: bool
) -> None:
    """theta, then the moments: each task's own where they have as many dimensions as g."""
    joint = g if m.dim() == g.dim() else _weighted(a, g, fused)
    theta.sub_(LR * _weighted(a, u, fused))
    m.copy_(C.b1 * m + (1 - C.b1) * joint)
    v.copy_(C.b2 * v + (1 - C.b2) * joint * joint)


def search(g: Tensor, m: Tensor, v: Tensor, *, fused: bool) -> Tensor:
    return _gram(_update(g.float(), m, v), fused)


def search_clippy(
    g: Tensor, m: Tensor, v: Tensor, theta: Tensor, *, fused: bool
) -> tuple[Tensor, Tensor]:
    u = _update(g.float(), m, v)
    sigma = _factors(u, theta)
    return _gram(_scaled(sigma, u), fused), sigma


def apply(g: Tensor, m: Tensor, v: Tensor, theta: Tensor, a: Tensor, *, fused: bool) -> None:
    g = g.float()
    _move(g, m, v, theta, a, _update(g, m, v), fused)


def apply_clippy(
    g: Tensor, m: Tensor, v: Tensor, theta: Tensor, a: Tensor, sigma: Tensor, *, fused: bool
) -> None:
    _move(g, m, v, theta, a, _scaled(sigma, _update(g, m, v)), fused)


def delayed(g: Tensor, m: Tensor, v: Tensor, theta: Tensor, a: Tensor, *, fused: bool) -> Tensor:
    g = g.float()
    u = _update(g, m, v)
    gram = _gram(u, fused)
    _move(g, m, v, theta, a, u, fused)
    return gram


def delayed_clippy(
    g: Tensor, m: Tensor, v: Tensor, theta: Tensor, a: Tensor, *, fused: bool
) -> tuple[Tensor, Tensor]:
    u = _update(g, m, v)
    sigma = _factors(u, theta)
    u = _scaled(sigma, u)
    gram = _gram(u, fused)
    _move(g, m, v, theta, a, u, fused)
    return gram, sigma


def combine(g: Tensor, a: Tensor, *, fused: bool) -> Tensor:
    return _weighted(a, g, fused)


def gram(g: Tensor, *, fused: bool) -> Tensor:
    return _gram(g, fused)


def check(g: Tensor, *, fused: bool) -> Tensor:
    """1 where an element is not finite or 2^63 and above: int32, as `found`."""
    del fused
    return 1 - (g.abs() < 2.0**63).all().int()


def perturb_given(theta: Tensor, scale: Tensor, u: Tensor, *, fused: bool) -> Tensor:
    del fused
    return theta + scale.view(-1, 1, 1, 1) * u


def perturb_gaussian(theta: Tensor, scale: Tensor, like: Tensor, *, fused: bool) -> Tensor:
    del fused
    return theta + scale.view(-1, 1, 1, 1) * torch.randn_like(like)


def perturb_rademacher(theta: Tensor, scale: Tensor, like: Tensor, *, fused: bool) -> Tensor:
    del fused
    scale = scale.view(-1, 1, 1, 1)
    return theta + torch.where(torch.rand_like(like) < 0.5, scale, -scale)


#: The function of a pass and the buffers it takes, by `gpu_kernels.Buffers`' names.
MATHS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "search": (search, ("grads", "m", "v")),
    "search_clippy": (search_clippy, ("grads", "m", "v", "params")),
    "search_adatask": (search, ("grads", "m", "v")),
    "apply": (apply, ("grads", "m", "v", "params", "a")),
    "apply_clippy": (apply_clippy, ("grads", "m", "v", "params", "a", "factors")),
    "apply_adatask": (apply, ("grads", "m", "v", "params", "a")),
    "delayed": (delayed, ("grads", "m", "v", "params", "a")),
    "delayed_clippy": (delayed_clippy, ("grads", "m", "v", "params", "a")),
    "delayed_adatask": (delayed, ("grads", "m", "v", "params", "a")),
    "combine": (combine, ("grads", "a")),
    "gram": (gram, ("grads",)),
    "check": (check, ("grads",)),
    "perturb_given": (perturb_given, ("params", "scale32", "direction")),
    "perturb_gaussian": (perturb_gaussian, ("params", "scale32", "out")),
    "perturb_rademacher": (perturb_rademacher, ("params", "scale32", "out")),
}


def eager(name: str) -> Callable[..., object]:
    """The pass in plain torch."""
    return functools.partial(MATHS[name][0], fused=False)


def fused(name: str) -> Callable[..., object]:
    """The pass as torch.compile likes it."""
    return functools.partial(MATHS[name][0], fused=True)
