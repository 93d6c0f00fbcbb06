// See dual_cone.h. Coordinates: eta_i = u_i |g_i|, x in the same, b = -C eta.

#include "dual_cone.h"

#include "active_set.h"
#include "dispatch.h"

namespace fastmto::solvers {
namespace {

constexpr double kAccepted = 1e-8;

// Adds the steps and the residual of a solved problem to info.
FASTMTO_INLINE Status account(const Cone& cone, End end, double scale, Info* info) {
  info->iterations += cone.steps;
  const double residual = violation(cone, scale);
  info->residual = max_of(info->residual, residual);
  if (end == End::kIndefinite) return Status::kNotPsd;
  return end == End::kLimit && !(residual <= kAccepted) ? Status::kMaxIterations : Status::kSolved;
}

FASTMTO_INLINE Status dual_cone_body(int n, const double* gram, const double* reference,
                                     double* workspace, double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  Status status = take_apart(n, ld, gram, true, &t);
  if (status != Status::kSolved) return status;
  double* eta = arena.take(ld);
  double* b = arena.take(ld);
  double unit = 0.0;
  for (int i = 0; i < n; ++i) {
    eta[i] = reference == nullptr ? t.length[i] : reference[i] * t.length[i];
    unit = max_of(unit, std::fabs(eta[i]));
  }
  const double share = 1.0 / n;
  if (unit > 0.0) {
    double scale = 0.0;
    for (int i = 0; i < n; ++i) {
      eta[i] /= unit;
      scale += std::fabs(eta[i]);
    }
    for (int i = n; i < ld; ++i) eta[i] = 0.0;
    transposed_product(n, ld, t.c, eta, b);
    for (int j = 0; j < ld; j += kLanes) pack(b + j) = -pack(b + j);
    Cone cone = carve_cone(n, ld, t.c, b, &arena);
    const End end = minimise(&cone);
    status = account(cone, end, scale, info);
    if (status != Status::kSolved) return status;
    for (int i = 0; i < n; ++i) {
      const double x = cone.x[i] * unit * t.s[i];
      weights[i] = reference == nullptr ? share * (1.0 + x) : reference[i] + x;
    }
  } else {
    for (int i = 0; i < n; ++i) weights[i] = reference == nullptr ? share : reference[i];
  }
  return Status::kSolved;
}

FASTMTO_INLINE Status upgrad_body(int n, const double* gram, const double* preference,
                                  double* workspace, double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  Status status = take_apart(n, ld, gram, true, &t);
  if (status != Status::kSolved) return status;
  double* total_x = arena.take(ld);
  double* b = arena.take(ld);
  Cone cone = carve_cone(n, ld, t.c, b, &arena);
  for (int j = 0; j < ld; ++j) total_x[j] = 0.0;
  // Sums in units of the longest, so that they stay finite.
  double longest = 0.0;
  for (int i = 0; i < n; ++i) longest = max_of(longest, t.length[i]);
  for (int i = 0; i < n; ++i) {
    const double p = (preference == nullptr ? 1.0 : preference[i]) *
                     (t.length[i] > 0.0 ? t.length[i] / longest : 0.0);
    const double sign = p < 0.0 ? 1.0 : -1.0;
    const double* row = t.c + static_cast<std::ptrdiff_t>(i) * ld;
    bool conflict = p < 0.0;
    for (int j = 0; j < n; ++j) conflict |= row[j] < 0.0;
    if (p == 0.0 || !conflict) continue;
    for (int j = 0; j < ld; j += kLanes) pack(b + j) = sign * pack(row + j);
    clear(&cone.set);
    const End end = minimise(&cone);
    status = account(cone, end, 1.0, info);
    if (status != Status::kSolved) return status;
    const double size = std::fabs(p);
    for (int j = 0; j < ld; j += kLanes) pack(total_x + j) += size * pack(cone.x + j);
  }
  const double share = 1.0 / n;
  for (int i = 0; i < n; ++i) {
    const double x = total_x[i] * (longest * t.s[i]);
    weights[i] = preference == nullptr ? share * (1.0 + x) : preference[i] + x;
  }
  return Status::kSolved;
}

FASTMTO_DISPATCH(dual_cone_body,
                 (int n, const double* gram, const double* reference, double* workspace,
                  double* weights, Info* info),
                 (n, gram, reference, workspace, weights, info))
FASTMTO_DISPATCH(upgrad_body,
                 (int n, const double* gram, const double* preference, double* workspace,
                  double* weights, Info* info),
                 (n, gram, preference, workspace, weights, info))

}  // namespace

Status dual_cone(int tasks, const double* gram, const double* reference, double* workspace,
                 double* weights, Info* info) {
  return dual_cone_body_chosen(tasks, gram, reference, workspace, weights, info);
}

Status upgrad(int tasks, const double* gram, const double* preference, double* workspace,
              double* weights, Info* info) {
  return upgrad_body_chosen(tasks, gram, preference, workspace, weights, info);
}

}  // namespace fastmto::solvers
