"""PUB and its parts in float64 and in the papers' notation: slow, plain, the judge of the kernels.

Everything works on explicit float64 vectors, one operation of the paper a line. Nothing here is
shared with the fast path but the rules' hyperparameters.

    theta (P)   shared parameters        m, v (P)   moments       t   1-based step
    g_i (P)     gradient of task i       u_i (P)    its update    a   task weights (T)

Sources: PUB, arXiv 2410.05806, Algorithm 1, Claim 1 and equations 2-4; Clippy, arXiv 2302.09178;
AdaTask, AAAI 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.rules import AdaGrad, Adam, Clippy, RMSProp, Rule

State = dict[str, Tensor]


def initial_state(rule: Rule, theta: Tensor) -> State:
    """The moments before the first step, float64, shaped like `theta`."""
    return {
        name: torch.full_like(theta, rule.initial(name), dtype=torch.float64)
        for name in rule.state_names
    }


def advance(rule: Rule, t: int, g: Tensor, old: State) -> tuple[Tensor, State]:
    """One step of the plain rule on gradient `g`: its update u and the new moments.

    Args:
        rule: hyperparameters.
        t: 1-based number of the step.
        g: (P,) float64.
        old: moments before the step, not modified.

    Returns:
        u (P,), to be multiplied by -lr, and the moments after the step.
    """
    if isinstance(rule, Adam):
        b1, b2 = rule.betas
        m = b1 * old["exp_avg"] + (1 - b1) * g
        v = b2 * old["exp_avg_sq"] + (1 - b2) * g**2
        m_hat = m / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        return m_hat / (v_hat.sqrt() + rule.eps), {"exp_avg": m, "exp_avg_sq": v}
    if isinstance(rule, AdaGrad):
        v = old["sum"] + g**2
        return g / (v.sqrt() + rule.eps), {"sum": v}
    if isinstance(rule, RMSProp):
        b2 = rule.alpha
        v = b2 * old["square_avg"] + (1 - b2) * g**2
        new = {"square_avg": v}
        if rule.centered:
            q = b2 * old["grad_avg"] + (1 - b2) * g
            new["grad_avg"] = q
            v = (v - q**2).clamp(min=0)
        u = g / (v.sqrt() + rule.eps)
        if rule.momentum > 0:
            u = rule.momentum * old["momentum_buffer"] + u
            new["momentum_buffer"] = u
        return u, new
    raise TypeError(f"rule must be Adam, AdaGrad or RMSProp, got {type(rule).__name__}")


def clippy_factor(clippy: Clippy, lr: float, theta: Tensor, u: Tensor) -> float:
    """sigma = min(1, min_j (lambda_rel |theta_j| + lambda_abs) / (lr |u_j|)) of one tensor."""
    move = lr * u.abs()
    allowed = clippy.lambda_rel * theta.abs() + clippy.lambda_abs
    ratios = allowed[move > 0] / move[move > 0]
    return min(1.0, float(ratios.min())) if len(ratios) else 1.0


def gram_of(updates: Tensor) -> Tensor:
    """G = U U^T of the rows of `updates` (T, P), in float64."""
    return updates.double() @ updates.double().T


def bargaining(gram: Tensor, iterations: int = 200) -> Tensor:
    """a > 0 with G a = 1/a, by damped Newton on the convex f(a) = a'Ga/2 - sum_i log a_i.

    Works on the correlation matrix (a_i scales as 1/||u_i||); f is self-concordant, so a step
    of 1/(1 + decrement) always descends. For Grams that have a solution; no statuses here.
    """
    G = gram.double()
    s = G.diagonal().rsqrt()
    C = s[:, None] * G * s
    y = torch.ones_like(s)
    for _ in range(iterations):
        gradient = C @ y - 1 / y
        hessian = C + torch.diag(y**-2)
        direction = torch.linalg.solve(hessian, gradient)
        decrement = float((gradient @ direction).clamp(min=0).sqrt())
        y = y - direction / (1 + decrement if decrement > 0.1 else 1)
    return y * s


def scale_weights(a: Tensor, gram: Tensor, scale: str, n_parameters: int) -> Tensor:
    """The length of the joint step, chosen on purpose (the papers fix it at sqrt(T)).

    none       a as it is
    sum        sum_i a_i = T
    mean_norm  ||sum_i a_i u_i|| = mean_i ||u_i||
    rms        ||sum_i a_i u_i|| = sqrt(P)
    """
    length = math.sqrt(float(a @ gram @ a))
    if scale == "none":
        return a
    if scale == "sum":
        return a * (len(a) / float(a.sum()))
    if scale == "mean_norm":
        return a * (float(gram.diagonal().sqrt().mean()) / length)
    if scale == "rms":
        return a * (math.sqrt(n_parameters) / length)
    raise ValueError(f"scale must be none, sum, mean_norm or rms, got {scale!r}")


@dataclass
class ReferencePUB:
    """Algorithm 1 of PUB on one list of parameter tensors, given the per-task gradients.

    Args:
        theta: float64 tensors, the shared parameters; replaced at every step.
        n_tasks: T.
        rule, lr, weight_decay: the plain optimizer.
        clippy: its hyperparameters, or None.
        adatask: every task keeps its own moments.
    """

    theta: list[Tensor]
    n_tasks: int
    rule: Rule
    lr: float
    weight_decay: float = 0.0
    clippy: Clippy | None = None
    adatask: bool = False
    t: int = 0
    #: state[i][k]: moments of tensor k for task i; without AdaTask all tasks share entry 0.
    state: list[list[State]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.theta = [p.double() for p in self.theta]
        owners = self.n_tasks if self.adatask else 1
        self.state = [[initial_state(self.rule, p) for p in self.theta] for _ in range(owners)]

    def updates(self, grads: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """u_i of every task and tensor for grads[i][k], with the old moments."""
        rows = []
        for i, row in enumerate(grads):
            old = self.state[i if self.adatask else 0]
            us = [
                advance(self.rule, self.t + 1, g.double(), s)[0]
                for g, s in zip(row, old, strict=True)
            ]
            if self.clippy is not None:
                us = [
                    clippy_factor(self.clippy, self.lr, p, u) * u
                    for p, u in zip(self.theta, us, strict=True)
                ]
            rows.append(us)
        return rows

    def gram(self, grads: Sequence[Sequence[Tensor]]) -> Tensor:
        """G = U U^T over all tensors."""
        rows = [torch.cat([u.flatten() for u in us]) for us in self.updates(grads)]
        return gram_of(torch.stack(rows))

    def step(self, grads: Sequence[Sequence[Tensor]], a: Tensor) -> None:
        """theta <- (1 - lr wd) theta - lr sum_i a_i u_i, then the moments on g = sum_i a_i g_i
        (with AdaTask task i's moments on g_i)."""
        us = self.updates(grads)
        self.t += 1
        for k, p in enumerate(self.theta):
            joint = sum((a_i * row[k] for a_i, row in zip(a.tolist(), us, strict=True)), 0 * p)
            self.theta[k] = (1 - self.lr * self.weight_decay) * p - self.lr * joint
            if self.adatask:
                for i, row in enumerate(grads):
                    self.state[i][k] = advance(
                        self.rule, self.t, row[k].double(), self.state[i][k]
                    )[1]
            else:
                g = sum(
                    (a_i * row[k].double() for a_i, row in zip(a.tolist(), grads, strict=True)),
                    0 * p,
                )
                self.state[0][k] = advance(self.rule, self.t, g, self.state[0][k])[1]
