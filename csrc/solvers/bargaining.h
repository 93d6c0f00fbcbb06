// Bargaining weights from a Gram matrix: the exact solution and the papers' CCP procedure.
//
// T tasks with updates u_i; gram[i][j] = <u_i, u_j>; preferences p_i > 0 (1 by default).
//
//   exact  the a > 0 with  a_i (G a)_i = p_i                                            (1)
//          (Nash-MTL, arXiv 2202.01017, Claim 3.1; PUB, arXiv 2410.05806, Claim 1). It is the
//          minimiser of the strictly convex a'Ga/2 - sum_i p_i log a_i and exists unless 0 is in
//          the convex hull of the updates (Pareto stationarity).
//   ccp    the fixed point (or the iterate after max_steps) of                          (2)
//          a <- argmin 1'Gx + phi'(a)'x   s.t.  x_i (G x)_i >= p_i, x >= 0
//          phi'(a) = 1/a + G (1/(G a))
//          (PUB, equations 2-4, without the Frobenius normalisation, which cancels). It need not
//          be the exact solution, and it depends on the scale of the updates.
//
// A ridge replaces G by G + ridge * diag(G) in everything above.
//
// Contract of all functions
//   - no exception, no allocation, no global state but the choice of the instruction set;
//   - inputs are not modified; `weights` must not overlap them;
//   - `workspace` is 64-byte aligned scratch, at least *_workspace(tasks) doubles, contents
//     undefined before and after;
//   - `weights` (T) is written if and only if kSolved is returned; `info` is always written;
//   - results are finite, loops are bounded, and the same input gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace fastmto::solvers {

struct Problem {
  int tasks;                 // T >= 1
  const double* gram;        // (T, T) row-major; symmetric up to rounding
  const double* preference;  // (T) positive and finite, or nullptr for all 1
  double ridge;              // >= 0 and finite
};

// Info here:
//   iterations  exact: Newton steps; ccp: outer steps; step: interior-point steps
//   residual    exact: max_i |a_i (G a)_i / p_i - 1|
//               ccp, step: max_i |a_i / a_i' - 1|, a' the iterate before the last step
//   kappa       max_i (y_i / p_i) sum_i y_i, y_i = a_i sqrt(gram[i][i]) of the exact solution:
//               relative error of a per relative error of the cosines
//               (both 0 where the solver did not get so far)

// Length of the workspace in doubles.
constexpr std::size_t exact_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (2 * t + 8);
}
constexpr std::size_t ccp_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (5 * t + 29);
}

// Equation (1) by damped Newton on the correlation matrix; closed forms for T <= 2.
//   warm_start  (T) positive and finite, or nullptr; a start that fails is retried without it
//   tol         stop at residual <= max(tol, 4 eps kappa)
// Returns kSolved, kNotFinite, kNotSymmetric, kZeroUpdate, kNotPsd, kNearStationary or
// kMaxIterations.
Status bargaining_exact(const Problem& problem, const double* warm_start, double tol,
                        double* workspace, double* weights, Info* info);

// Procedure (2), at most max_steps >= 1 subproblems, fewer once a step changes no weight by more
// than max(tol, 1e-9) relative. Reaching max_steps is what the papers do and is kSolved: `residual`
// says how far the last step moved.
//   warm_start  (T) positive and finite: the first iterate; nullptr for all 1
// Returns what bargaining_exact returns (its solution whitens the problem), or kUnbounded.
Status bargaining_ccp(const Problem& problem, const double* warm_start, int max_steps, double tol,
                      double* workspace, double* weights, Info* info);

// One subproblem of (2), linearised at `previous` (T), positive and finite.
Status ccp_step(const Problem& problem, const double* previous, double* workspace, double* weights,
                Info* info);

}  // namespace fastmto::solvers
