// The point of the simplex {w >= 0, sum w = 1} next to a vector:
//
//     w = max(vector - theta, 0),  theta such that sum w = 1
//
// theta by Michelot's (1986) shrinking sets.
//
// Contract: see bargaining.h, but no workspace. Info: passes; |sum w - 1|; kappa 0.
#pragma once

#include "status.h"

namespace fastmto::solvers {

// vector, weights (tasks). Returns kSolved or kNotFinite.
Status simplex_projection(int tasks, const double* vector, double* weights, Info* info);

}  // namespace fastmto::solvers
