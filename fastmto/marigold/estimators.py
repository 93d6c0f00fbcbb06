"""From losses at displaced parameters to directional derivatives and Gram matrices.

Ours, after the idea of arXiv 2603.07389 (whose public text is its abstract and Lemma 3.1, which
bounds the error of a zeroth-order estimate of an l-smooth function). With g_j = grad f_j and a
displacement mu v:

    forward   <g_j, v> = (f_j(theta + mu v) - f_j(theta)) / mu + b,  |b| <= l mu ||v||^2 / 2
    central   <g_j, v> = (f_j(theta + mu v) - f_j(theta - mu v)) / (2 mu) + b,
              |b| <= rho mu^2 ||v||^3 / 6,  rho a Lipschitz constant of the Hessian

The error of rounding falls with the step h = mu ||v|| and the bias grows with it; they meet at
h* = 2 sqrt(eps |f| / l) (forward) and (3 eps |f| / rho)^(1/3) (central), eps of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: h / ||theta|| by the precision of the forward pass: measured on an MLP for float32 (relative
#: errors of y 1e-3 and 2e-5) and for bfloat16 over float32 parameters (3e-2 and 2e-3); float64 is
#: float32's with eps in the formulas above replaced, float16 lies between by the same.
RELATIVE_STEPS = {
    "forward": {
        torch.float64: 1e-8,
        torch.float32: 1e-4,
        torch.float16: 1e-3,
        torch.bfloat16: 2e-3,
    },
    "central": {
        torch.float64: 1e-6,
        torch.float32: 1e-3,
        torch.float16: 5e-3,
        torch.bfloat16: 1e-2,
    },
}
#: A step of at least this many eps ||theta|| is realised to about 10 % of its length or better
#: whatever its direction: each coordinate is rounded by at most eps |theta_i| / 2.
SMALLEST_STEP = 4.0


def directions_gram(slopes: Tensor) -> Tensor:
    """G_hat = Y'Y / R, unbiased where E[u u'] = I; of rank <= R.

    Args:
        slopes: Y (R, T) float64, derivatives of the losses along R random directions u_r.

    Returns:
        (T, T).
    """
    gram: Tensor = slopes.T @ slopes
    return gram / len(slopes)


def span_gram(slopes: Tensor, inner: Tensor) -> Tensor:
    """G_hat = Y'(VV')^+ Y: the Gram matrix of the gradients projected on the span of V's rows.

    No variance, and G - G_hat is positive semidefinite. Directions of the span that rounding
    cannot tell from none (relative 1e-10 after normalising the rows) are left out.

    Args:
        slopes: Y (K, T) float64, derivatives along the K rows v_k.
        inner: VV' (K, K) float64.

    Returns:
        (T, T).
    """
    lengths = inner.diagonal().clamp_min(0).sqrt()
    used = lengths > 0
    slopes = slopes[used] / lengths[used, None]
    values, vectors = torch.linalg.eigh(inner[used][:, used] / lengths[used] / lengths[used, None])
    kept = values > 1e-10 * len(values)
    half = (vectors[:, kept].T @ slopes) / values[kept, None].sqrt()
    gram: Tensor = half.T @ half
    return gram


def relative_steps(difference: str, precision: torch.dtype) -> float:
    """h / ||theta|| for a "forward" or "central" difference, by the forward pass' precision.

    Raises:
        ValueError: a precision that is not in the table.
    """
    table = RELATIVE_STEPS[difference]
    if precision not in table:
        raise ValueError(f"forward_dtype must be one of {list(table)}, got {precision}")
    return table[precision]


def narrowest(losses: Sequence[Tensor], default: torch.dtype) -> torch.dtype:
    """The narrowest floating dtype in the graphs of the losses: what autocast computed in."""
    known = RELATIVE_STEPS["forward"]
    found = {default} | {loss.dtype for loss in losses}
    seen = set()
    waiting = [loss.grad_fn for loss in losses]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {entry.dtype for entry in node._input_metadata}
        waiting += [following for following, _ in node.next_functions]
    return max(found & set(known), key=lambda dtype: torch.finfo(dtype).eps)
