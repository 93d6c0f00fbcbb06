"""MARIGOLD in float64, one equation a line: slow, plain, the judge of `fastmto.MARIGOLD`.

    theta (P)      shared parameters      f  theta -> (T) losses      lambda_ (T)  on the simplex
    g (T, P)       task gradients         d = sum_i lambda_i g_i      y_j = <g_j, d>
    G = g g'       Gram matrix            u_r, v_k  directions

Source of the idea: arXiv 2603.07389; the formulas are ours (see `fastmto.MARIGOLD`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def gradients(f: Function, theta: Tensor) -> Tensor:
    """g (T, P), exact."""
    rows: Tensor = torch.autograd.functional.jacobian(f, theta)  # type: ignore[no-untyped-call]
    return rows


def forward(f: Function, theta: Tensor, d: Tensor, mu: float) -> Tensor:
    """(f(theta + mu d) - f(theta)) / mu."""
    return (f(theta + mu * d) - f(theta)) / mu


def central(f: Function, theta: Tensor, d: Tensor, mu: float) -> Tensor:
    """(f(theta + mu d) - f(theta - mu d)) / (2 mu)."""
    return (f(theta + mu * d) - f(theta - mu * d)) / (2 * mu)


def reuse(f: Function, theta: Tensor, after: Tensor, eta: float) -> Tensor:
    """(f(theta_t) - f(theta_{t+1})) / eta."""
    return (f(theta) - f(after)) / eta


def directions_gram(g: Tensor, u: Tensor) -> Tensor:
    """G_hat = Y Y' / R with Y_jr = <g_j, u_r>; u (R, P)."""
    y = g @ u.T
    return y @ y.T / len(u)


def directions_variance(g: Tensor, distribution: str) -> Tensor:
    """(T, T): R times the variance of the entries of `directions_gram`.

    gaussian    G_ii G_jj + G_ij^2                             (E[u u u u] by Isserlis)
    rademacher  that - 2 sum_k g_ik^2 g_jk^2                   (fourth moment 1, not 3)
    sphere      P/(P + 2) (G_ii G_jj + 2 G_ij^2) - G_ij^2      (radius sqrt(P))
    """
    gram = g @ g.T
    products = torch.outer(gram.diagonal(), gram.diagonal())
    if distribution == "gaussian":
        return products + gram**2
    if distribution == "rademacher":
        return products + gram**2 - 2 * (g**2) @ (g**2).T
    p = g.shape[1]
    return p / (p + 2) * (products + 2 * gram**2) - gram**2


def span_gram(g: Tensor, v: Tensor) -> Tensor:
    """G_hat = Y' (V V')^+ Y with Y_kj = <v_k, g_j>; v (K, P)."""
    y = v @ g.T
    gram: Tensor = y.T @ torch.linalg.pinv(v @ v.T, hermitian=True) @ y
    return gram


def project(x: Tensor) -> Tensor:
    """The nearest point of the simplex, by bisection on the shift that makes the sum 1."""
    low, high = float(x.min()) - 1, float(x.max())
    for _ in range(200):
        shift = (low + high) / 2
        if float((x - shift).clamp_min(0).sum()) > 1:
            low = shift
        else:
            high = shift
    return (x - high).clamp_min(0)


def projected(lambda_: Tensor, y: Tensor, step: float) -> Tensor:
    """lambda <- Proj(lambda - step y)."""
    return project(lambda_ - step * y)


def mirror(lambda_: Tensor, y: Tensor, step: float) -> Tensor:
    """logits <- logits - step y, lambda = softmax(logits)."""
    return (lambda_.log() - step * y).softmax(0)


@dataclass
class Marigold:
    """MARIGOLD with gradient descent on theta, `step` by step.

    Args:
        f: the losses.
        theta: where to start.
        estimator: "exact", "forward", "central" or "reuse".
        mu: of the differences.
        eta: learning rate of theta.
        rule: "mirror" or "projected".
        ema: of y.
        beta: step of lambda times the running bound.
    """

    f: Function
    theta: Tensor
    estimator: str
    mu: float
    eta: float
    rule: str = "mirror"
    ema: float = 0.9
    beta: float = 2.0
    average: Tensor = field(init=False)
    lambda_: Tensor = field(init=False)
    bound: float = 0.0

    def __post_init__(self) -> None:
        n_tasks = len(self.f(self.theta))
        self.lambda_ = torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64)
        self.average = torch.zeros(n_tasks, dtype=torch.float64)

    def step(self) -> None:
        """theta by d(lambda_t), lambda by what was found at theta_t."""
        g = gradients(self.f, self.theta)
        d = self.lambda_ @ g
        after = self.theta - self.eta * d
        y = {
            "exact": lambda: g @ d,
            "forward": lambda: forward(self.f, self.theta, d, self.mu),
            "central": lambda: central(self.f, self.theta, d, self.mu),
            "reuse": lambda: reuse(self.f, self.theta, after, self.eta),
        }[self.estimator]()
        squares = y**2 if self.rule == "mirror" else (y @ y)[None]
        self.bound = max(self.bound, float(squares.max() / (d @ d)))
        self.average = self.ema * self.average + (1 - self.ema) * y
        move = mirror if self.rule == "mirror" else projected
        self.lambda_ = move(self.lambda_, self.average, self.beta / self.bound)
        self.theta = after
