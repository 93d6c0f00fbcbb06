// MGDA: the point of least norm in the convex hull of the gradients.
//
//     minimise  w'G w   subject to  w >= 0, sum w = 1                                        (1)
//
// (Desideri 2012; Sener & Koltun, arXiv 1810.04650, equation 4). With y_i = w_i |g_i| and the
// cosines C this is, up to the length of y, the dual of the hard-margin problem
//
//     minimise  y'C y / 2 - sum_i y_i / |g_i|,  y >= 0                                        (2)
//
// which is unbounded exactly where 0 is in the hull; the direction of descent then is the answer,
// as in Wolfe's (1976) method for (1), whose active sets these are. So lengths of any spread cost
// no accuracy: w'G w is within rounding, eps (sum_i w_i |g_i|)^2, of the minimum. The minimiser
// need not be unique (equal gradients); the point G w is.
//
// A zero gradient is the point of least norm: weight 1, shared equally if there are several.
//
// Contract: see bargaining.h. Info: steps of (2); the largest violation of
// (G w)_i >= w'G w (= where w_i > 0), relative to |g_i| sum_j w_j |g_j|; kappa 0.
#pragma once

#include <cstddef>

#include "status.h"

namespace fastmto::solvers {

constexpr std::size_t mgda_workspace(int tasks) {
  const std::size_t t = static_cast<std::size_t>(tasks);
  return (t + 7) / 8 * 8 * (2 * t + 13);
}

// gram (tasks, tasks) row-major. Returns kSolved, kNotFinite, kNotSymmetric, kNotPsd or
// kMaxIterations.
Status mgda(int tasks, const double* gram, double* workspace, double* weights, Info* info);

}  // namespace fastmto::solvers
