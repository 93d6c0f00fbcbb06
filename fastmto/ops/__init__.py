"""The passes over the flat shared parameters, one dispatch table by device.

Every op has the same signature on every device and writes into the caller's tensors. The backend
is chosen per call by the device of the tensors (`on`); naming one is for tests and benches.

Shapes and dtypes, the same for all ops:

    grads   (T, P)  per-task gradients; float64, float32, bfloat16 or float16; every row
                    contiguous, rows may be padded apart; read only
    state           tuple of tensors in the order of `rule.state_names`; each (P,) contiguous, or
                    (T, P) with contiguous rows where every task keeps its own moments (AdaTask);
                    float64 where grads are float64, else float32
    params  (P,)    contiguous, the dtype of grads
    weights (T,)    float64, on the device of grads; 0 leaves a task out of the sums
    gram    (T, T)  float64, on the device of grads; written whole, symmetric bit for bit
    sigma   (T, S)  float64, on the device of grads; Clippy's factors, one a task and tensor
    segments (S+1,) int64 on the CPU; tensor s owns coordinates segments[s] to segments[s+1],
                    segments[0] = 0, segments[S] = P
    step            1-based number of the step being made; with (T, P) state a sequence of T such
                    numbers, 0 for a task that takes no part: its Gram row and column are 0, its
                    moments keep still and its weight counts as 0

The ops, with u_i the update that `rule` makes of g_i with the old moments (rules.py):

    search      gram_ij = <u_i, u_j>; nothing else is written. With clippy (then params, lr,
                segments and sigma are needed): sigma is written, and u_i stands for
                sigma_is u_i on every tensor s
    apply       params <- (1 - lr weight_decay) params - lr sum_i weights_i u_i, with
                sigma_is u_i in place of u_i where sigma (and segments) are given, then the
                moments take one step of the rule on g = sum_i weights_i g_i, or, with (T, P)
                state, task i's on g_i alone
    delayed     search and apply with the weights of an earlier search, in one pass
    gram        gram_ij = <g_i, g_j>, of the gradients themselves; no rule, no state. gram_ii is NaN
                or infinite where row i holds a NaN, an infinity or an element whose square the
                maths cannot hold (from 2^64 in float32, 2^512 in float64); products that float32
                takes for 0 (both factors below about 1e-23) count as 0
    combine     out (P,) = sum_i weights_i g_i, in the dtype of grads. `out` may be one of the rows
                of grads, which is then overwritten by the sum; it may not overlap several
    perturb     out_r = params + scale_r u_r for the R rows of out (R, P), contiguous each; params,
                out and direction are float32 or all float64, scale (R,) is float64. u_r is
                `direction` (P,) or its row r (R, P), or else direction number offset + r of `seed`,
                standard normal or +-1 by `distribution`, as fastmto.philox says: made on the way
                and stored nowhere. Every backend, thread count and tiling gives the same bits:
                scale is rounded to the dtype of params, then one rounding for the product and one
                for the sum. out may be params where R = 1
    all_finite  whether no element is NaN, infinite or so large (2^63 where the maths is float32,
                2^511 where it is float64) that moments of its square would be infinite for good;
                in a search such an element makes its task's gram_ii NaN or infinite

The maths is float32 for float32, bfloat16 and float16 inputs, and float64 for float64. Gram sums
run in blocks in that precision and are combined in float64. All reductions have a fixed order:
the same inputs, device and thread count give the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from ..rules import Clippy, Rule

Steps = int | Sequence[int]


class Backend(Protocol):
    """What a backend module offers; the semantics are the module's docstring above."""

    def search(
        self,
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
    ) -> None: ...

    def apply(
        self,
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
    ) -> None: ...

    def delayed(
        self,
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
    ) -> None: ...

    def gram(self, grads: Tensor, gram: Tensor) -> None: ...

    def combine(self, grads: Tensor, weights: Tensor, out: Tensor) -> None: ...

    def perturb(
        self,
        params: Tensor,
        out: Tensor,
        *,
        scale: Tensor,
        direction: Tensor | None = None,
        seed: int | None = None,
        offset: int = 0,
        distribution: str = "gaussian",
    ) -> None: ...

    def all_finite(self, tensor: Tensor) -> bool: ...


#: Device type -> module of this package. A new backend is a file and a row here.
BACKENDS = {"cpu": "cpu", "cuda": "gpu"}


def on(device: torch.device) -> Backend:
    """The ops for tensors on `device`.

    Raises:
        ValueError: no backend for this type of device.
    """
    if device.type not in BACKENDS:
        raise ValueError(f"device must be one of {', '.join(BACKENDS)}, got {device}")
    return cast(Backend, importlib.import_module(f".{BACKENDS[device.type]}", __name__))
