// See cagrad.h. Coordinates: x_i = (v_i - 1/T) |g_i|, eta_i = |g_i| / T, beta = C eta, s_i = 1/|g_i|
// up to a factor that m carries. On the active set S the path is x = m lift - drop with
// lift = C_SS^-1 s_S, drop = C_SS^-1 beta_S, and off it the slack h = C x + beta - m s is >= 0.

#include "cagrad.h"

#include "active_set.h"
#include "dispatch.h"

namespace fastmto::solvers {
namespace {

constexpr double kAccepted = 1e-8;

struct Path {
  ActiveSet set;
  double* s;
  double* beta;
  double* lift;   // in the order of the set
  double* drop;   // in the order of the set
  double* x;      // in the order of the set
  double* slack;  // h, by task
  double* rate;   // dh/dm, by task
  double* q;      // in the order of the set
};

FASTMTO_INLINE double inner(const ActiveSet& set, const double* by_place, const double* by_task) {
  double sum = 0.0;
  for (int i = 0; i < set.size; ++i) sum += by_place[i] * by_task[set.index[i]];
  return sum;
}

FASTMTO_INLINE void append_independent(ActiveSet* set, int j) {
  const double d = project(*set, j);
  if (independent(*set, d)) append(set, j, d);
}

// Follows the path from m to where x'C x = radius^2 or m = ceiling. Returns m; p.x is set.
FASTMTO_INLINE double follow(const Path& path, ActiveSet* set, double m, double ceiling,
                             double radius2, int limit, bool* reached, std::int32_t* steps) {
  const Path& p = path;
  const int n = set->n;
  const int ld = set->ld;
  *reached = false;
  int stalled = 0;  // changes of the set since m last moved
  int last = -1;    // task that left last
  for (;; ++*steps) {
    solve_on(*set, p.s, p.lift);
    solve_on(*set, p.beta, p.drop);
    double mass = 0.0;
    for (int i = 0; i < set->size; ++i) {
      p.x[i] = max_of(m * p.lift[i] - p.drop[i], 0.0);
      mass += std::fabs(p.lift[i]);
    }
    if (*steps >= limit) return m;
    for (int j = 0; j < ld; j += kLanes) {
      pack(p.slack + j) = pack(p.beta + j) - m * pack(p.s + j);
      pack(p.rate + j) = -pack(p.s + j);
    }
    accumulate(*set, p.x, 1.0, p.slack);
    accumulate(*set, p.lift, 1.0, p.rate);
    // x'C x along the segment: rise^2 a + 2 rise b + now.
    const double a = inner(*set, p.lift, p.s);
    const double b = inner(*set, p.x, p.s);
    double now = m * b - inner(*set, p.x, p.beta);
    now = max_of(now, 0.0);
    const double missing = radius2 - now;
    if (!(missing > 0.0)) {
      *reached = true;
      return m;
    }
    const double root = std::sqrt(b * b + a * missing);
    double rise = a > 0.0 && root + b > 0.0 ? missing / (root + b) : DBL_MAX;
    int leave = -1, enter = -1;
    for (int i = 0; i < set->size; ++i) {
      if (!(p.lift[i] < 0.0)) continue;
      const double until = p.x[i] / -p.lift[i];
      if (until < rise) {
        rise = until;
        leave = i;
      }
    }
    for (int j = 0; j < n; ++j) {
      if (set->place[j] >= 0 || !(p.s[j] > 0.0)) continue;
      if (stalled > 0 && j == last) continue;
      if (!(p.rate[j] < -16.0 * kEps * (mass + p.s[j]))) continue;
      const double until = max_of(p.slack[j], 0.0) / -p.rate[j];
      if (until < rise) {
        rise = until;
        enter = j;
      }
    }
    if (!(rise < DBL_MAX) || m + rise >= ceiling) {
      if (!(ceiling < DBL_MAX)) return m;
      for (int i = 0; i < set->size; ++i)
        p.x[i] = max_of(ceiling * p.lift[i] - p.drop[i], 0.0);
      return ceiling;
    }
    stalled = rise > 0.0 ? 0 : stalled + 1;
    m += rise;
    if (enter < 0 && leave < 0) {
      for (int i = 0; i < set->size; ++i) p.x[i] = max_of(m * p.lift[i] - p.drop[i], 0.0);
      *reached = true;
      return m;
    }
    if (enter < 0) {
      last = set->index[leave];
      remove(set, leave);
      continue;
    }
    last = -1;
    const double d = project(*set, enter);
    if (independent(*set, d)) {
      append(set, enter, d);
      continue;
    }
    // x may move along the null direction at this m; a task that it takes to 0 makes room.
    null_direction(*set, p.q);
    double length = DBL_MAX;
    for (int i = 0; i < set->size; ++i) {
      if (!(p.q[i] < 0.0)) continue;
      const double reach = max_of(m * p.lift[i] - p.drop[i], 0.0) / -p.q[i];
      if (reach < length) {
        length = reach;
        leave = i;
      }
    }
    for (int i = 0; i < set->size; ++i) p.x[i] = max_of(m * p.lift[i] - p.drop[i], 0.0);
    if (!(length < DBL_MAX)) return m;  // 0 is in the hull
    last = set->index[leave];
    remove(set, leave);
    append_independent(set, enter);
    ++stalled;
  }
}

FASTMTO_INLINE Status cagrad_body(int n, const double* gram, double c, double* workspace,
                                  double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  Arena arena{workspace};
  Cosines t = carve_cosines(n, ld, &arena);
  const Status status = take_apart(n, ld, gram, true, &t);
  if (status != Status::kSolved) return status;
  Path p;
  p.set = carve_active_set(n, ld, t.c, &arena);
  double* eta = arena.take(ld);
  p.s = arena.take(ld);
  p.beta = arena.take(ld);
  p.lift = arena.take(ld);
  p.drop = arena.take(ld);
  p.x = arena.take(ld);
  p.slack = arena.take(ld);
  p.rate = arena.take(ld);
  p.q = arena.take(ld);
  const double share = 1.0 / n;
  for (int i = 0; i < n; ++i) weights[i] = share;
  double longest = 0.0, shortest = DBL_MAX;
  for (int i = 0; i < n; ++i) {
    longest = max_of(longest, t.length[i]);
    if (t.length[i] > 0.0) shortest = min_of(shortest, t.length[i]);
  }
  if (!(longest > 0.0) || c == 0.0) return Status::kSolved;
  double eta_sum = 0.0;
  for (int i = 0; i < ld; ++i) {
    eta[i] = t.length[i] / longest;  // times T, the longest being 1
    p.s[i] = shortest * t.s[i];
    eta_sum += eta[i];
  }
  transposed_product(n, ld, t.c, eta, p.beta);
  const double mean2 = dot(ld, eta, p.beta);
  // |g0| is known to within eps of the lengths summed.
  if (!(mean2 > 16.0 * kEps * kEps * eta_sum * eta_sum)) return Status::kSolved;
  const double radius2 = c * c * mean2;
  double m = DBL_MAX;
  int start = 0;
  for (int i = 0; i < n; ++i) {
    if (!(p.s[i] > 0.0)) continue;
    const double gain = p.beta[i] / p.s[i];
    if (gain < m) {
      m = gain;
      start = i;
    }
  }
  const double ceiling = t.zeros > 0 ? 0.0 : DBL_MAX;
  if (m >= ceiling) return Status::kSolved;
  append_independent(&p.set, start);
  bool reached = false;
  m = follow(p, &p.set, m, ceiling, radius2, 20 * n + 100, &reached, &info->iterations);
  for (int j = 0; j < ld; j += kLanes)
    pack(p.slack + j) = pack(p.beta + j) - m * pack(p.s + j);
  accumulate(p.set, p.x, 1.0, p.slack);
  double scale = eta_sum, worst = 0.0;
  for (int i = 0; i < p.set.size; ++i) scale += p.x[i];
  for (int j = 0; j < n; ++j) {
    const bool active = p.set.place[j] >= 0;
    if (p.s[j] > 0.0) worst = max_of(worst, active ? std::fabs(p.slack[j]) : -p.slack[j]);
  }
  info->residual = worst / scale;
  for (int i = 0; i < p.set.size; ++i) {
    const int j = p.set.index[i];
    weights[j] = share * (1.0 + p.x[i] * (longest * t.s[j]));
  }
  return Status::kSolved;
}

FASTMTO_DISPATCH(cagrad_body,
                 (int n, const double* gram, double c, double* workspace, double* weights,
                  Info* info),
                 (n, gram, c, workspace, weights, info))

}  // namespace

Status cagrad(int tasks, const double* gram, double c, double* workspace, double* weights,
              Info* info) {
  return cagrad_body_chosen(tasks, gram, c, workspace, weights, info);
}

}  // namespace fastmto::solvers
