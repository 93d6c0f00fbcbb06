// CAGrad: the direction within c |g0| of the mean gradient g0 whose smallest gain is largest.
//
//     maximise  min_i <g_i, d>   subject to  |d - g0| <= c |g0|,   g0 = sum_i g_i / T         (1)
//
// (Liu et al., arXiv 2110.14048, equation 2; algorithm 1 solves the dual
// min_{w in simplex} <g_w, g0> + c |g0| |g_w|, g_w = sum_i w_i g_i.) The solution is
// d = g0 + c |g0| / |g_w| g_w; `weights` are those of d itself, v_i = 1/T + c |g0| / |g_w| w_i,
// not rescaled.
//
// With the least gain m as the parameter, v solves
//     minimise v'G v / 2 - m sum v   subject to  v >= 1/T                                     (2)
// and |d - g0| grows with m: the path of solutions, linear between changes of the active set, is
// followed from m = min_i <g_i, g0>, v = 1/T, until |d - g0| = c |g0| (Markowitz's critical line).
//
// Where that length is never reached, 0 is in the hull of the gradients (g_w = 0 in the dual): the
// gain cannot rise above m = 0, and v is that of the d with this gain that is closest to g0. Where
// g0 = 0 to rounding, v = 1/T. A zero gradient has <g_i, d> = 0 and weight 1/T.
//
// Contract: see bargaining.h. Info: changes of the active set; the largest violation of
// <g_i, d> >= m (= where v_i > 1/T), relative to |g_i| sum_j v_j |g_j|; kappa 0.
#pragma once

#include <cstddef>

#include "status.h"

namespace fastmto::solvers {

constexpr std::size_t cagrad_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (3 * t + 27);
}

// gram (tasks, tasks) row-major; c >= 0. Returns kSolved, kNotFinite, kNotSymmetric, kNotPsd or
// kMaxIterations.
Status cagrad(int tasks, const double* gram, double c, double* workspace, double* weights,
              Info* info);

}  // namespace fastmto::solvers
