"""Bargaining weights of T tasks from the Gram matrix of their updates or gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted, to_vector

if TYPE_CHECKING:
    from .convert import Vector

_bargaining = _solvers.bargaining


def bargaining(
    gram: Kind,
    method: str = "exact",
    preference: Vector | None = None,
    warm_start: Vector | None = None,
    tol: float = 1e-13,
    max_steps: int = 20,
    ridge: float = 0.0,
) -> Result[Kind]:
    """Weights a > 0 of the bargaining solution.

    Sources: Nash-MTL, arXiv 2202.01017, Claim 3.1; PUB, arXiv 2410.05806, Claim 1 and equations
    2-4. The papers treat two problems as one; here they are two methods.

    `exact`: the only a > 0 with

        a_i (G a)_i = p_i

    the minimiser of a'Ga/2 - sum_i p_i log a_i, by damped Newton on the correlation matrix. It
    does not depend on the lengths of the updates (u_i -> c u_i gives a_i -> a_i / c).

    `ccp`: what the papers' convex-concave procedure computes, from a = 1 or `warm_start`:

        a <- argmin 1'Gx + phi'(a)'x   s.t.  x_i (G x)_i >= p_i, x >= 0
        phi'(a) = 1/a + G (1/(G a))

    Its fixed point need not be the exact solution and depends on the lengths of the updates. The
    subproblems are solved to about 1e-10 for lengths spread over up to 12 decades, to 1e-5 where a
    constraint is only just active; the Frobenius normalisation of the published code cancels and is
    left out.

    Failures that depend on the numbers are a status, not an exception:

        solved
        not_finite       gram holds NaN or infinity
        not_symmetric    beyond 1e-5 of the lengths of the two updates
        zero_update      a task whose update is zero
        not_psd          no Gram matrix: negative lengths, cosines beyond 1, negative directions
        near_stationary  no solution, or nearer to Pareto stationarity than float64 can resolve
        unbounded        ccp: the problem linearised at the start has no finite minimum
                         (some (G a)_i <= 0 there)
        max_iterations   the tolerance was not reached (seen only with ccp, from a start with some
                         (G a)_i <= 0: for a kappa above 1e8, and for a singular G, 2 % of those
                         with repeated updates of lengths over 12 decades, else 1 in thousands)

    Args:
        gram: (T, T) array or tensor of any floating dtype and layout, symmetric up to rounding
            (the two halves are averaged), on any device; computed in float64 on the host. Not
            modified.
        method: "exact" or "ccp".
        preference: (T,) bargaining powers p > 0; equal by default. Twice the preference is
            sqrt(2) times the weights.
        warm_start: (T,) positive. exact: where to start, e.g. the last weights; it changes the
            number of iterations, the result only within `tol`. ccp: the first iterate, on which
            the result may depend.
        tol: in (0, 1). exact: largest allowed residual; what rounding allows, 4 eps kappa, is
            added where that is more. ccp: stop when no weight moves by more, at least 1e-9.
        max_steps: ccp: subproblems at most. Reaching it is "solved": that is what the procedure
            is; see `residual`.
        ridge: solve with G + ridge * diag(G), which has a solution for every Gram matrix.

    Returns:
        `Result` with
            weights     (T,): float64 for an array; for a tensor on its device with its dtype, but
                        at least float32. None unless solved.
            status      one of the names above; `ok` is whether it is "solved".
            iterations  Newton steps, or outer steps of the CCP.
            residual    exact: max_i |a_i (G a)_i / p_i - 1|; ccp: largest relative change of a
                        weight in the last outer step.
            kappa       of the exact solution, in the units of the correlation matrix: a relative
                        error e in the cosines is at most about kappa e in the weights. 1 for
                        equal updates, T for orthogonal ones, infinite at Pareto stationarity.
        The weights carry the inverse unit of the updates: ||sum_i a_i u_i||^2 = sum_i p_i (exact).

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: a shape, a dtype, the method, or a preference, warm start, tol, max_steps or
            ridge out of range.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.bargaining(gram).status
        'solved'
    """
    result = _bargaining(gram, method, preference, warm_start, tol, max_steps, ridge)
    if result is not None:
        return result
    # Something has to be converted; nothing has been refused so far.
    return converted(
        _bargaining,
        gram,
        method,
        to_vector(preference, "preference"),
        to_vector(warm_start, "warm_start"),
        tol,
        max_steps,
        ridge,
    )


def ccp_step(
    gram: Kind,
    previous: Vector,
    preference: Vector | None = None,
    ridge: float = 0.0,
) -> Result[Kind]:
    """One outer step of method "ccp" of `bargaining`, linearised at `previous`.

    Args:
        gram, preference, ridge: as `bargaining`.
        previous: (T,) positive, the last iterate.

    Returns:
        As `bargaining`; `iterations` counts interior-point steps (0 where all constraints are
        active and the answer is the exact solution).
    """
    return converted(
        _solvers.ccp_step,
        gram,
        to_vector(previous, "previous"),
        to_vector(preference, "preference"),
        ridge,
    )
