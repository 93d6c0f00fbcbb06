// IMTL-G: the combination with equal projections on all gradients.
//
//     <g_i, d> / |g_i| equal for all i,   d = sum_i w_i g_i,   sum w = 1                     (1)
//
// (Liu et al., ICLR 2021, section 3.1.) On the cosines C: w_i = v_i / |g_i| / sum_j v_j / |g_j|
// with C v = 1, in place of the paper's equation 6, which singles out the first task. Weights may
// be negative, and d one along which losses rise, where the sum of v_i / |g_i| is negative.
//
// For T = 2 they are w = (|g_2|, |g_1|) / (|g_1| + |g_2|) whatever the cosine: in (1) the limit
// where the gradients are parallel, as it is everywhere else.
//
// Contract: see bargaining.h. Info: iterations 0; max_i |(C v)_i - 1| / (1 + sum |v|); kappa 0.
#pragma once

#include <cstddef>

#include "status.h"

namespace fastmto::solvers {

constexpr std::size_t imtl_g_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (2 * t + 8);
}

// gram (tasks, tasks) row-major. Returns kSolved, kNotFinite, kNotSymmetric, kZeroUpdate, kNotPsd
// or kSingular: dependent gradients (T > 2), or a sum of v_i / |g_i| that is 0 to rounding.
Status imtl_g(int tasks, const double* gram, double* workspace, double* weights, Info* info);

}  // namespace fastmto::solvers
