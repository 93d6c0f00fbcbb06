// See mgda.h.

#include "mgda.h"

#include "active_set.h"
#include "dispatch.h"

namespace fastmto::solvers {
namespace {

constexpr double kAccepted = 1e-8;

FASTMTO_INLINE Status two(const Cosines& t, double* weights) {
  const double longest = max_of(t.length[0], t.length[1]);
  const double a = t.length[0] / longest;
  const double b = t.length[1] / longest;
  const double cosine = t.c[1];
  // (G w)_1 = (G w)_2 at w ~ (b (b - cosine a), a (a - cosine b)).
  const double first = b * (b - cosine * a);
  const double second = a * (a - cosine * b);
  if (first > 0.0 && second > 0.0) {
    const double whole = first + second;
    weights[0] = first / whole;
    weights[1] = second / whole;
  } else if (first > 0.0) {
    weights[0] = 1.0;
    weights[1] = 0.0;
  } else if (second > 0.0) {
    weights[0] = 0.0;
    weights[1] = 1.0;
  } else {
    weights[0] = weights[1] = 0.5;
  }
  return Status::kSolved;
}

FASTMTO_INLINE Status mgda_body(int n, const double* gram, double* workspace, double* weights,
                                Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  const Status status = take_apart(n, ld, gram, true, &t);
  if (status != Status::kSolved) return status;
  if (t.zeros > 0) {
    for (int i = 0; i < n; ++i) weights[i] = t.length[i] > 0.0 ? 0.0 : 1.0 / t.zeros;
    return Status::kSolved;
  }
  if (n == 1) {
    weights[0] = 1.0;
    return Status::kSolved;
  }
  if (n == 2) return two(t, weights);
  double* b = arena.take(ld);
  double shortest = DBL_MAX;
  for (int i = 0; i < n; ++i) shortest = min_of(shortest, t.length[i]);
  for (int i = 0; i < ld; ++i) b[i] = i < n ? shortest / t.length[i] : 0.0;
  Cone cone = carve_cone(n, ld, t.c, b, &arena);
  const End end = minimise(&cone);
  info->iterations = cone.steps;
  if (end == End::kIndefinite) return Status::kNotPsd;
  info->residual = violation(cone, 0.0);
  if (end == End::kLimit && !(info->residual <= kAccepted)) return Status::kMaxIterations;
  double whole = 0.0;
  for (int i = 0; i < n; ++i) whole += cone.x[i] * b[i];
  for (int i = 0; i < n; ++i) weights[i] = cone.x[i] * b[i] / whole;
  return Status::kSolved;
}

FASTMTO_DISPATCH(mgda_body,
                 (int n, const double* gram, double* workspace, double* weights, Info* info),
                 (n, gram, workspace, weights, info))

}  // namespace

Status mgda(int tasks, const double* gram, double* workspace, double* weights, Info* info) {
  return mgda_body_chosen(tasks, gram, workspace, weights, info);
}

}  // namespace fastmto::solvers
