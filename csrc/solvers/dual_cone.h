// Projections onto the dual cone of the gradients, {d : <g_i, d> >= 0 for all i}.
//
//     minimise  v'G v   subject to  v >= u                                                   (1)
//
// The weights v of the projection of sum_i u_i g_i (UPGrad, Quinton & Rey, arXiv 2406.16232,
// proposition 1). With v = u + x: a linear complementarity problem x >= 0, G (u + x) >= 0,
// x'G (u + x) = 0, solved on the cosines, so that g_i -> c_i g_i, u_i -> u_i / c_i only rescales
// v. No ridge is added: where G is singular the projection is still unique, its weights may not be.
//
//   dual_cone  (1) for one reference u: DualProj for u the preference
//   upgrad     sum over i of the solutions for u = p_i e_i
//
// A zero gradient keeps v_i = u_i. Contract: see bargaining.h. Info: steps; the largest violation
// of (G v)_i >= 0 (= where v_i > u_i), relative to |g_i| sum_j (|u_j| + v_j - u_j) |g_j| of its
// problem; kappa 0.
#pragma once

#include <cstddef>

#include "status.h"

namespace fastmto::solvers {

constexpr std::size_t dual_cone_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (2 * t + 15);
}

// gram (tasks, tasks) row-major; reference (tasks) finite, or nullptr for 1 / tasks each.
// Returns kSolved, kNotFinite, kNotSymmetric, kNotPsd or kMaxIterations.
Status dual_cone(int tasks, const double* gram, const double* reference, double* workspace,
                 double* weights, Info* info);

// preference (tasks) finite, or nullptr for 1 / tasks each; otherwise as dual_cone.
Status upgrad(int tasks, const double* gram, const double* preference, double* workspace,
              double* weights, Info* info);

}  // namespace fastmto::solvers
