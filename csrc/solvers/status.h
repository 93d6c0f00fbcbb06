// How a small solver ended. The one list of statuses for every solver of this folder.
#pragma once

#include <cstdint>

namespace fastmto::solvers {

enum class Status : std::int32_t {
  kSolved = 0,
  kNotFinite,       // the Gram matrix holds NaN or infinity
  kNotSymmetric,    // gram[i][j] and gram[j][i] differ by more than rounding
  kZeroUpdate,      // some gram[i][i] is 0 (or subnormal): that task has no update
  kNotPsd,          // not a Gram matrix: a negative square length, a cosine outside [-1, 1], ...
  kNearStationary,  // no solution, or none that float64 can tell apart from none: Pareto stationary
  kUnbounded,       // CCP: the subproblem linearised at the given iterate has no finite minimum
  kMaxIterations,   // did not reach the tolerance
  kSingular,        // equations of which no solution exists, or more than one
};

constexpr int kStatusCount = 9;

// What a solver reports beside its status; each header says what the numbers mean there.
struct Info {
  std::int32_t iterations;
  double residual;
  double kappa;
};

}  // namespace fastmto::solvers
