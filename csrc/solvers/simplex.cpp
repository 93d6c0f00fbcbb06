// See simplex.h.

#include "simplex.h"

#include <cfloat>
#include <cmath>

namespace fastmto::solvers {

Status simplex_projection(int tasks, const double* vector, double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  double peak = -DBL_MAX;
  for (int i = 0; i < tasks; ++i) {
    if (!(std::fabs(vector[i]) <= DBL_MAX)) return Status::kNotFinite;
    peak = vector[i] > peak ? vector[i] : peak;
  }
  // Relative to the largest entry theta lies in [-1, 0), and entries below -1 are out.
  double theta = -1.0;
  int inside = tasks + 1;
  for (;;) {
    double sum = 0.0;
    int count = 0;
    for (int i = 0; i < tasks; ++i) {
      const double v = vector[i] - peak;
      if (!(v > theta)) continue;
      sum += v;
      ++count;
    }
    if (count == inside) break;
    inside = count;
    ++info->iterations;
    const double next = (sum - 1.0) / count;
    theta = next > theta ? next : theta;
  }
  double whole = 0.0;
  for (int i = 0; i < tasks; ++i) {
    const double w = vector[i] - peak - theta;
    weights[i] = w > 0.0 ? w : 0.0;
    whole += weights[i];
  }
  info->residual = std::fabs(whole - 1.0);
  return Status::kSolved;
}

}  // namespace fastmto::solvers
