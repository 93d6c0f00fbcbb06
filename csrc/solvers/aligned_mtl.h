// Aligned-MTL: the weights that make the gradients orthogonal and of equal length.
//
//     w = sigma V diag(lambda)^-1/2 V' p,   G = V diag(lambda) V'                             (1)
//
// (Senushkin et al., CVPR 2023, algorithm 1) over the eigenvalues above T eps max(lambda), for
// preferences p = 1/T, eps the relative rounding of G's entries, with sigma the root of
//   kMin     the smallest of them (the paper)
//   kMedian  their median, the lower one of two (the authors' code)
//   kRmse    their mean (the authors' code)
// For G = 0 the weights are p. By Householder tridiagonalisation and implicit QL: only V' p is
// carried along, so V is never formed. Errors are about max(lambda) / min(lambda) times
// G's rounding.
//
// Contract: see bargaining.h. Info: iterations counts the QL sweeps; residual 0; kappa =
// max(lambda) / min(lambda) over those above the cut.
#pragma once

#include <cstddef>

#include "status.h"

namespace fastmto::solvers {

enum class Scale { kMin, kMedian, kRmse };

constexpr std::size_t aligned_mtl_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (7 * t + 5);
}

// gram (tasks, tasks) row-major; eps in [0, 1): float64's is the least that counts, and the largest
// eigenvalue stays in any case. Returns kSolved, kNotFinite, kNotSymmetric, kNotPsd or
// kMaxIterations.
Status aligned_mtl(int tasks, const double* gram, Scale scale, double eps, double* workspace,
                   double* weights, Info* info);

}  // namespace fastmto::solvers
