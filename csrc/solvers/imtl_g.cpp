// See imtl_g.h.

#include "imtl_g.h"

#include "active_set.h"
#include "dispatch.h"

namespace fastmto::solvers {
namespace {

// What keeps C from being factored.
FASTMTO_INLINE Status why(ActiveSet* set) {
  for (int j = 0; j < set->n; ++j) {
    const double d = project(*set, j);
    if (d < -kIndefinite) return Status::kNotPsd;
    if (d > smallest_pivot(*set, kEps)) append(set, j, d);
  }
  return Status::kSingular;
}

FASTMTO_INLINE Status imtl_g_body(int n, const double* gram, double* workspace, double* weights,
                                  Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  const Status status = take_apart(n, ld, gram, false, &t);
  if (status != Status::kSolved) return status;
  if (n == 1) {
    weights[0] = 1.0;
    return Status::kSolved;
  }
  if (n == 2) {
    const double longest = max_of(t.length[0], t.length[1]);
    const double a = t.length[0] / longest;
    const double b = t.length[1] / longest;
    weights[0] = b / (a + b);
    weights[1] = a / (a + b);
    return Status::kSolved;
  }
  ActiveSet set = carve_active_set(n, ld, t.c, &arena);
  double* v = arena.take(ld);
  for (int i = 0; i < n; ++i) {
    const double* from = t.c + static_cast<std::ptrdiff_t>(i) * ld;
    double* to = set.a + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = i / kLanes * kLanes; j < ld; j += kLanes) pack(to + j) = pack(from + j);
  }
  bool good = factor<4>(n, ld, set.a, set.inverse);
  for (int i = 0; good && i < n; ++i) good = set.inverse[i] * (kDependent * kEps * (i + 1)) < 1.0;
  if (!good) return why(&set);
  for (int i = 0; i < ld; ++i) v[i] = i < n ? 1.0 : 0.0;
  solve(n, ld, set.a, set.inverse, v);
  transposed_product(n, ld, t.c, v, set.column);
  double shortest = DBL_MAX;
  for (int i = 0; i < n; ++i) shortest = min_of(shortest, t.length[i]);
  double worst = 0.0, size = 1.0, whole = 0.0, parts = 0.0;
  for (int i = 0; i < n; ++i) {
    worst = max_of(worst, std::fabs(set.column[i] - 1.0));
    size += std::fabs(v[i]);
    v[i] *= shortest * t.s[i];
    whole += v[i];
    parts += std::fabs(v[i]);
  }
  info->residual = worst / size;
  if (!(std::fabs(whole) > 64.0 * kEps * parts)) return Status::kSingular;
  for (int i = 0; i < n; ++i) weights[i] = v[i] / whole;
  return Status::kSolved;
}

FASTMTO_DISPATCH(imtl_g_body,
                 (int n, const double* gram, double* workspace, double* weights, Info* info),
                 (n, gram, workspace, weights, info))

}  // namespace

Status imtl_g(int tasks, const double* gram, double* workspace, double* weights, Info* info) {
  return imtl_g_body_chosen(tasks, gram, workspace, weights, info);
}

}  // namespace fastmto::solvers
