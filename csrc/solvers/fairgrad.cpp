// See fairgrad.h. M = diag(y) C diag(y), w = y .* C y, pi = p .* y^(1-r), p_i = |g_i|^(r-1).

#include "fairgrad.h"

#include "dispatch.h"
#include "gram.h"

namespace fastmto::solvers {
namespace {

constexpr double kTolerance = 1e-13;
// Of a residual: larger ones are not accepted as rounding.
constexpr double kRounded = 1e-2;
// Of all relative changes of y in a Newton step.
constexpr double kSmallStep = 1e-11;
constexpr int kMaxBlind = 50;
constexpr double kLargestFall = 0.95;
constexpr int kMaxNewton = 300;
constexpr int kMaxLineSearch = 60;

// Minimiser of the convex objective along y (1 + t z), whose slope is
//   alpha t + beta - sum_i pi_i z_i (1 + t z_i)^-r,
// by Newton kept inside a shrinking bracket; the slope at 0 is -decrement < 0. No y_i falls by
// more than kLargestFall: for small r the minimum can be beyond it, next to y_i = 0, where the next
// step has no use for it.
FASTMTO_INLINE double line_search(int n, double r, const double* pi, const double* z, double z_min,
                                  double alpha, double beta, double decrement) {
  double low = 0.0;
  const double end = z_min < 0.0 ? -kLargestFall / z_min : DBL_MAX;
  double high = end;
  double t = min_of(1.0, 0.5 * high);
  for (int k = 0; k < kMaxLineSearch; ++k) {
    double slope = alpha * t + beta;
    double curvature = max_of(alpha, 0.0);
    for (int i = 0; i < n; ++i) {
      const double base = 1.0 + t * z[i];
      const double term = pi[i] * z[i] * std::pow(base, -r);
      slope -= term;
      curvature += r * term * z[i] / base;
    }
    if (std::fabs(slope) <= 0.02 * decrement) break;
    if (slope < 0.0) {
      low = t;
    } else {
      high = t;
    }
    double next = t - slope / curvature;
    if (!(next > low)) next = 0.5 * (low + t);
    if (!(next < high)) next = high < DBL_MAX ? 0.5 * (t + high) : 2.0 * t;
    t = next;
    if (high == end && t > 0.99 * end) break;
  }
  return t;
}

FASTMTO_INLINE Status fairgrad_body(int n, const double* gram, double alpha, double* workspace,
                                    double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  const double r = 1.0 / alpha;
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  const Status status = take_apart(n, ld, gram, false, &t);
  if (status != Status::kSolved) return status;
  double* a = arena.take(static_cast<std::size_t>(n) * ld);
  double* inverse = arena.take(ld);
  double* p = arena.take(ld);
  double* y = arena.take(ld);
  double* w = arena.take(ld);
  double* pi = arena.take(ld);
  double* z = arena.take(ld);
  // p up to a factor, and y where C is the identity.
  double middle = 0.0;
  for (int i = 0; i < n; ++i) middle += std::log(t.length[i]) / n;
  for (int i = 0; i < n; ++i) {
    const double log_p = (r - 1.0) * (std::log(t.length[i]) - middle);
    p[i] = std::exp(log_p);
    y[i] = std::exp(log_p / (1.0 + r));
    if (!(p[i] >= DBL_MIN && p[i] <= DBL_MAX)) return Status::kMaxIterations;
  }
  for (int i = n; i < ld; ++i) p[i] = y[i] = w[i] = pi[i] = z[i] = 0.0;
  int blind_steps = 0;
  for (int k = 0;; ++k) {
    transposed_product(n, ld, t.c, y, w);
    double q = 0.0, whole = 0.0, y_sum = 0.0;
    for (int i = 0; i < n; ++i) {
      w[i] *= y[i];
      pi[i] = r == 1.0 ? 1.0 : p[i] * std::pow(y[i], 1.0 - r);
      q += w[i];
      whole += pi[i];
      y_sum += y[i];
    }
    if (!(q > 0.0))
      return q < -64.0 * kEps * y_sum * y_sum ? Status::kNotPsd : Status::kNearStationary;
    // sqrt(q) / y_sum bounds the distance of 0 from the hull of the unit gradients from above.
    if (!(8.0 * kEps * y_sum * y_sum <= q / n)) return Status::kNearStationary;
    // The best multiple of y.
    const double ray = std::pow(whole / q, 1.0 / (1.0 + r));
    const double pi_ray = std::pow(ray, 1.0 - r);
    double residual = 0.0;
    for (int i = 0; i < n; ++i) {
      y[i] *= ray;
      w[i] *= ray * ray;
      pi[i] *= pi_ray;
      z[i] = pi[i] - w[i];
      residual = max_of(residual, std::fabs(z[i]) / pi[i]);
    }
    double kappa = 0.0;
    for (int i = 0; i < n; ++i) {
      const double* row = t.c + static_cast<std::ptrdiff_t>(i) * ld;
      double load = 0.0;
      for (int j = 0; j < n; ++j) load += std::fabs(row[j]) * y[j];
      kappa = max_of(kappa, load * y[i] / pi[i]);
    }
    info->iterations = k;
    info->residual = residual;
    info->kappa = kappa;
    if (!(residual <= DBL_MAX && kappa <= DBL_MAX)) {
      info->residual = info->kappa = 0.0;
      return Status::kMaxIterations;
    }
    const double rounding = 4.0 * kEps * kappa;
    if (residual <= max_of(kTolerance, min_of(rounding, kRounded))) break;
    // Rounding of w hides the rest of the way, if it does not end by the steps.
    const bool blind = residual <= rounding;
    if (blind && ++blind_steps > kMaxBlind) return Status::kNearStationary;
    if (k == kMaxNewton) return rounding > kRounded ? Status::kNearStationary : Status::kMaxIterations;
    for (int i = 0; i < n; ++i) {
      const double* c = t.c + static_cast<std::ptrdiff_t>(i) * ld;
      double* row = a + static_cast<std::ptrdiff_t>(i) * ld;
      for (int j = i / kLanes * kLanes; j < ld; j += kLanes)
        pack(row + j) = y[i] * pack(c + j) * pack(y + j);
      row[i] += r * pi[i];
    }
    if (!factor<4>(n, ld, a, inverse))
      return rounding > kRounded ? Status::kNearStationary : Status::kNotPsd;
    solve(n, ld, a, inverse, z);
    double z_min = 0.0, z_max = 0.0, decrement = 0.0, spread = 0.0, beta = 0.0;
    for (int i = 0; i < n; ++i) {
      z_min = min_of(z_min, z[i]);
      z_max = max_of(z_max, z[i]);
      decrement += z[i] * (pi[i] - w[i]);
      spread += r * pi[i] * z[i] * z[i];
      beta += z[i] * w[i];
    }
    // Where w is known less well than pi only the step tells.
    if (blind && z_max < kSmallStep && z_min > -kSmallStep) break;
    double step = 1.0;
    if (!(z_min > -0.1 && z_max < 0.1)) {
      if (!(decrement > 0.0))
        return rounding > kRounded ? Status::kNearStationary : Status::kNotPsd;
      step = line_search(n, r, pi, z, z_min, decrement - spread, beta, decrement);
    }
    for (int i = 0; i < n; ++i) y[i] *= 1.0 + step * z[i];
  }
  // p was divided by exp((r - 1) middle).
  const double unit = std::exp((r - 1.0) * middle / (1.0 + r));
  for (int i = 0; i < n; ++i) weights[i] = y[i] * t.s[i] * unit;
  return Status::kSolved;
}

FASTMTO_DISPATCH(fairgrad_body,
                 (int n, const double* gram, double alpha, double* workspace, double* weights,
                  Info* info),
                 (n, gram, alpha, workspace, weights, info))

}  // namespace

Status fairgrad(int tasks, const double* gram, double alpha, double* workspace, double* weights,
                Info* info) {
  return fairgrad_body_chosen(tasks, gram, alpha, workspace, weights, info);
}

}  // namespace fastmto::solvers
