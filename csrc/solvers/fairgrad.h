// FairGrad: weights of alpha-fair descent.
//
//     (G a)_i = a_i^(-1/alpha),  a > 0                                                        (1)
//
// (Ban & Ji, arXiv 2402.15638, equation 4), the minimiser of the strictly convex
// a'G a / 2 - sum_i a_i^(1-r) / (1-r), r = 1/alpha (the logarithm for r = 1: bargaining). With
// a_i = y_i / |g_i| and the cosines C:  y_i^r (C y)_i = |g_i|^(r-1).
//
// Contract: see bargaining.h. Info: Newton steps; max_i |a_i^r (G a)_i - 1|; kappa =
// max_i a_i^r sum_j |G_ij| a_j, by how much relative errors of the cosines are magnified.
#pragma once

#include <cstddef>

#include "status.h"

namespace fastmto::solvers {

constexpr std::size_t fairgrad_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (2 * t + 9);
}

// gram (tasks, tasks) row-major; alpha > 0. Returns kSolved, kNotFinite, kNotSymmetric,
// kZeroUpdate, kNotPsd, kNearStationary or kMaxIterations.
Status fairgrad(int tasks, const double* gram, double alpha, double* workspace, double* weights,
                Info* info);

}  // namespace fastmto::solvers
