// PCGrad: every gradient projected on the normal planes of those it conflicts with, one after the
// other, and the results summed (Yu et al., arXiv 2001.06782, algorithm 1).
//
//     h_i <- g_i;  for j in orders[i]:  if <h_i, g_j> < 0:  h_i <- h_i - <h_i, g_j> / |g_j|^2 g_j
//     sum_i h_i = sum_j w_j g_j
//
// Each h_i stays a combination of the rows, so all of it is done on the Gram matrix, in O(T^3).
// Zero gradients conflict with nothing.
//
// Contract: see bargaining.h. Info: iterations is the number of projections; residual and kappa 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace fastmto::solvers {

constexpr std::size_t pcgrad_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (t + 5);
}

// gram (tasks, tasks) row-major; orders (tasks, tasks - 1) row-major, row i the other tasks in the
// order in which task i meets them. Returns kSolved, kNotFinite, kNotSymmetric or kNotPsd.
Status pcgrad(int tasks, const double* gram, const std::int64_t* orders, double* workspace,
              double* weights, Info* info);

}  // namespace fastmto::solvers
