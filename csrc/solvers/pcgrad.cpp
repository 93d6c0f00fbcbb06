// See pcgrad.h. Everything on the cosines: h_i = |g_i| sum_j y_j g_j / |g_j|.

#include "pcgrad.h"

#include "dispatch.h"
#include "gram.h"

namespace fastmto::solvers {
namespace {

FASTMTO_INLINE Status pcgrad_body(int n, const double* gram, const std::int64_t* orders,
                                  double* workspace, double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  const Status status = take_apart(n, ld, gram, true, &t);
  if (status != Status::kSolved) return status;
  double* y = arena.take(ld);
  double* inner = arena.take(ld);  // <h_i, g_j> / (|g_i| |g_j|)
  double* sum_y = arena.take(ld);
  double longest = 0.0;
  for (int i = 0; i < n; ++i) longest = max_of(longest, t.length[i]);
  for (int j = 0; j < ld; ++j) sum_y[j] = 0.0;
  for (int i = 0; i < n; ++i) {
    if (!(t.length[i] > 0.0)) continue;
    const double* own = t.c + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = 0; j < ld; j += kLanes) {
      pack(y + j) = Pack{};
      pack(inner + j) = pack(own + j);
    }
    for (int k = 0; k < n - 1; ++k) {
      const auto j = static_cast<int>(orders[static_cast<std::ptrdiff_t>(i) * (n - 1) + k]);
      const double shift = inner[j];
      if (!(shift < 0.0)) continue;
      y[j] -= shift;
      const double* row = t.c + static_cast<std::ptrdiff_t>(j) * ld;
      for (int m = 0; m < ld; m += kLanes) pack(inner + m) -= shift * pack(row + m);
      ++info->iterations;
    }
    const double size = t.length[i] / longest;
    for (int j = 0; j < ld; j += kLanes) pack(sum_y + j) += size * pack(y + j);
  }
  for (int j = 0; j < n; ++j) weights[j] = 1.0 + sum_y[j] * (longest * t.s[j]);
  return Status::kSolved;
}

FASTMTO_DISPATCH(pcgrad_body,
                 (int n, const double* gram, const std::int64_t* orders, double* workspace,
                  double* weights, Info* info),
                 (n, gram, orders, workspace, weights, info))

}  // namespace

Status pcgrad(int tasks, const double* gram, const std::int64_t* orders, double* workspace,
              double* weights, Info* info) {
  return pcgrad_body_chosen(tasks, gram, orders, workspace, weights, info);
}

}  // namespace fastmto::solvers
