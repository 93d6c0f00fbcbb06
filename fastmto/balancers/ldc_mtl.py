"""Loss discrepancy control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_choice, check_number
from ..engine.batch import Batch
from ..engine.per_task import like, put, take
from .loss_balancer import LearningBalancer


class LDCMTL(LearningBalancer):
    """LDC-MTL: learnable weights and a penalty on the gaps between the tasks' losses.

    Source: Xiao, Dong, Zou & Ji, "LDC-MTL: Balancing Multi-Task Learning through Scalable Loss
    Discrepancy Control", arXiv 2502.08585, the simplified single-loop first-order algorithm. The
    bilevel problem

        min_W f(W, x*),   f = sum_{i<T} |tau_i l_i - tau_{i+1} l_{i+1}|
        s.t. x* minimises g(W, x) = sum_i sigma_i(W) l_i(x)

    becomes, with a penalty for the lower level and without the gradient of the lower level's
    optimum, which the paper measures to be negligible, one descent on W and the model x together:

        J(W, x) = g(W, x) + penalty f(W, x)

    which is the paper's f + lambda g over lambda, as in the released code. By hand, with
    c_i = sign(d_i) - sign(d_{i-1}), d_i = tau_i l_i - tau_{i+1} l_{i+1}:

        w_i = (sigma_i / Z + penalty tau_i c_i) dl_i/dL_i           weight of the loss L_i
        dJ/dsigma_i = l_i / Z + penalty c_i l_i [tau = sigma]       then through sigma(W)

    The weights may be negative: a loss below its neighbours' is lifted.

    Choices that the paper and its released code make, by argument:
      - sigma: "sigmoid" of W, g divided by Z = sum_j sigma_j held constant (the code for CelebA,
        W = 1 at first); or "softmax" of W, Z = 1. W is one free number a task, as in that code;
        the paper has a small network that makes the weights from the shared features.
      - tau: "sigma" (CelebA, NYUv2, QM9), or "one": f is then free of W and acts on the model
        alone (Cityscapes).
      - normalization, l_i from the raw loss L_i and the first loss seen of the task, L_i(0):
        "identical" l_i = L_i (CelebA, Cityscapes); "rescaled" l_i = L_i min_j L_j(0) / L_i(0)
        (NYUv2); "log" l_i = log(L_i / L_i(0)) (QM9, where the code takes a new L_i(0) each epoch).

    The order of the tasks matters for T > 2: only neighbours are compared. With absent tasks the
    present ones close ranks, and softmax, sums and gaps are over them.

    Args:
        n_tasks: T, needed.
        penalty: factor of the gaps, >= 0; the released code has 0.1 for Cityscapes, 0.05 for NYUv2
            and QM9, 0.01 for CelebA.
        sigma, tau, normalization: see above.
        device, dtype: of W, see `LearningBalancer`.
        update_weights_every, on_nonfinite, loss_floor: see `Balancer`.

    Raises:
        ValueError: without `n_tasks`, or an argument out of range; with "rescaled" a first loss,
            with "log" any loss that is not positive (see `LossBalancer`).

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.LDCMTL(n_tasks=2)
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
        >>> len(balancer.parameters())  # for the optimizer
        2
    """

    key = "ldc_mtl"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        penalty: float = 0.1,
        sigma: str = "sigmoid",
        tau: str = "sigma",
        normalization: str = "identical",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
        loss_floor: float | None = None,
    ) -> None:
        self.penalty = check_number("penalty", penalty, 0)
        check_choice("sigma", sigma, ("softmax", "sigmoid"))
        check_choice("tau", tau, ("sigma", "one"))
        check_choice("normalization", normalization, ("identical", "rescaled", "log"))
        self.sigma, self.tau, self.normalization = sigma, tau, normalization
        super().__init__(
            n_tasks,
            init=1.0,
            device=device,
            dtype=dtype,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
            loss_floor=loss_floor,
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self.weights = torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64)
        # L(0); infinite where no loss was seen, so that a minimum passes over it.
        self._initial = torch.full((n_tasks,), float("inf"), dtype=torch.float64)
        self._seen = [False] * n_tasks

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        if self.normalization == "log":
            self._refuse_low(batch, "takes its logarithm")
        if self.normalization == "rescaled" and not all(self._seen[i] for i in batch.tasks):
            self._refuse_low(batch, "divides by a task's first loss")
        sigma, total = self._sigma(batch, losses)
        _, slopes, signs = self._discrepancy(batch, losses, sigma)
        tau = sigma if self.tau == "sigma" else 1.0
        return (sigma / total + self.penalty * tau * signs) * slopes

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        sigma, total = self._sigma(batch, losses)
        scaled, _, signs = self._discrepancy(batch, losses, sigma)
        self._remember(batch, losses)
        gradient = scaled / total
        if self.tau == "sigma":
            gradient = gradient + self.penalty * signs * scaled
        if self.sigma == "softmax":
            gradient = sigma * (gradient - (sigma * gradient).sum())
        else:
            gradient = sigma * (1 - sigma) * gradient
        self._add_gradients(batch, gradient)

    def _sigma(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor | float]:
        """sigma (n,) and what g is divided by."""
        w = self._learned(batch, losses)
        if self.sigma == "softmax":
            return w.softmax(0), 1.0
        sigma = w.sigmoid()
        return sigma, sigma.sum()

    def _discrepancy(
        self, batch: Batch, losses: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor | float, Tensor]:
        """l (n,), dl/dL (n,) and c (n,)."""
        scaled, slopes = self._normalized(batch, losses)
        terms = sigma * scaled if self.tau == "sigma" else scaled
        signs = (terms[:-1] - terms[1:]).sign()
        return scaled, slopes, functional.pad(signs, (0, 1)) - functional.pad(signs, (1, 0))

    def _normalized(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor | float]:
        """l (n,) and dl/dL (n,)."""
        if self.normalization == "identical":
            return losses, 1.0
        losses = self._floored(losses)
        initial = self._with_first(batch, losses)
        own = take(initial, batch.tasks)
        if self.normalization == "log":
            return (losses / own).log(), losses.reciprocal()
        slopes = initial.min() / own
        return losses * slopes, slopes

    def _with_first(self, batch: Batch, losses: Tensor) -> Tensor:
        """L(0) (T,), with this step's losses for tasks that are new."""
        losses = self._floored(losses)
        initial = like(self._initial, losses)
        for task, loss in zip(batch.tasks, losses.unbind(), strict=True):
            if not self._seen[task]:
                initial = put(initial, [task], loss.reshape(1))
        return initial

    def _remember(self, batch: Batch, losses: Tensor) -> None:
        self._initial = self._with_first(batch, losses)
        for task in batch.tasks:
            self._seen[task] = True

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "initial": self._initial.clone(),
            "seen": list(self._seen),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._initial = state["initial"].clone()
        self._seen = list(state["seen"])

    def _options(self) -> dict[str, Any]:
        return {
            "penalty": self.penalty,
            "sigma": self.sigma,
            "tau": self.tau,
            "normalization": self.normalization,
        }
