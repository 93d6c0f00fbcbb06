// See cagrad.h. Coordinates: x_i = (v_i - 1/T) |g_i|, eta_i = |g_i| / T, beta = C eta, s_i = 1/|g_i|
// up to a factor that m carries. On the active set S the path is x = m lift - drop with
// lift = C_SS^-1 s_S, drop = C_SS^-1 beta_S, and off it the slack h = C x + beta - m s is >= 0.

#include "cagrad.h"

#include "active_set.h"
#include "dispatch.h"

namespace fastmto::solvers {
namespace {

constexpr double kAccepted = 1e-10;
constexpr int kMaxRoots = 300;

struct Path {
  Cone cone;
  ActiveSet set;
  double* s;
  double* beta;
  double* lift;   // in the order of the set
  double* drop;   // in the order of the set
  double* x;      // in the order of the set
  double* slack;  // h, by task
  double* rate;   // dh/dm, by task
  double* q;      // in the order of the set
  double* b;      // right-hand side of the cone: m s - beta
};

FASTMTO_INLINE double inner(const ActiveSet& set, const double* by_place, const double* by_task) {
  double sum = 0.0;
  for (int i = 0; i < set.size; ++i) sum += by_place[i] * by_task[set.index[i]];
  return sum;
}

// Follows the path from m to where x'C x = radius^2, or m = ceiling, or x moves on only along
// directions that C takes to 0: the sum of x beyond `most`. Returns m; p.x is set.
FASTMTO_INLINE double follow(Path* path, ActiveSet* set, double m, double ceiling,
                             double radius2, double most, int limit,
                             std::int32_t* steps) {
  const Path& p = *path;
  const int n = set->n;
  const int ld = set->ld;
  int stalled = 0;  // changes of the set since m last moved
  int last = -1;    // task that left last
  for (;; ++*steps) {
    solve_on(*set, p.s, p.lift);
    solve_on(*set, p.beta, p.drop);
    double mass = 0.0, growth = 0.0, total_x = 0.0;
    for (int i = 0; i < set->size; ++i) {
      p.x[i] = max_of(m * p.lift[i] - p.drop[i], 0.0);
      mass += std::fabs(p.lift[i]);
      growth += p.lift[i];
      total_x += p.x[i];
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
    if (total_x + rise * growth > most) return m;
    stalled = rise > 0.0 ? 0 : stalled + 1;
    m += rise;
    if (enter < 0 && leave < 0) {
      for (int i = 0; i < set->size; ++i) p.x[i] = max_of(m * p.lift[i] - p.drop[i], 0.0);
      return m;
    }
    if (enter < 0) {
      last = set->index[leave];
      remove(set, leave);
      continue;
    }
    last = -1;
    const double d = project(*set, enter);
    if (d > smallest_pivot(*set, kEps)) {
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
    const double again = project(*set, enter);
    append(set, enter, max_of(again, smallest_pivot(*set, kEps)));
    ++stalled;
  }
}

// x in p.cone at m, with lift, drop and b of its set. Returns x'C x, or DBL_MAX where the sum of x
// is beyond `most`.
FASTMTO_INLINE double evaluate(Path* p, double m, double most, std::int32_t* steps) {
  Cone* cone = &p->cone;
  for (int j = 0; j < cone->set.ld; j += kLanes)
    pack(p->b + j) = m * pack(p->s + j) - pack(p->beta + j);
  const End end = minimise(cone);
  *steps += cone->steps;
  if (end != End::kOptimal || !(cone->x_sum <= most)) return DBL_MAX;
  solve_on(cone->set, p->s, p->lift);
  solve_on(cone->set, p->beta, p->drop);
  return max_of(dot(cone->set.ld, p->b, cone->x), 0.0);
}

// The m of follow() between low, where x = 0, and high, from solutions at one m after the other by
// Newton within a bracket: slower, and sure. Where the sum of x jumps beyond `most` before the
// radius is reached, or C has no solution there, it ends, with *jumps true.
FASTMTO_INLINE double search(Path* p, double low, double high, double radius2, double most,
                             std::int32_t* steps, bool* jumps) {
  const ActiveSet& set = p->cone.set;
  double m = high;
  double value = 0.0;
  *jumps = false;
  for (int k = 0; k < kMaxRoots; ++k) {
    value = evaluate(p, m, most, steps);
    if (value <= radius2) {
      low = m;
    } else {
      high = m;
      *jumps = !(value < DBL_MAX);
    }
    if (std::fabs(value - radius2) <= 4.0 * kEps * radius2) {
      low = m;
      break;
    }
    if (low == high) break;
    double next = DBL_MAX;
    if (value < DBL_MAX) {
      // The root of the segment that m is on.
      const double a = inner(set, p->lift, p->s);
      const double b = dot(set.ld, p->cone.x, p->s);
      const double inside = b * b + a * (radius2 - value);
      if (inside >= 0.0) next = m + (radius2 - value) / (std::sqrt(inside) + b);
    }
    if (!(next > low && next < high)) next = low + 0.5 * (high - low);
    if (!(next > low && next < high)) break;
    m = next;
  }
  if (m != low) evaluate(p, low, DBL_MAX, steps);
  return low;
}

// Largest violation of the optimality conditions at m for x in p.cone, relative to eta and x.
FASTMTO_INLINE double mismatch(const Path& p, const ActiveSet& set, double m, double scale) {
  const double* x = p.cone.x;
  transposed_product(set.n, set.ld, set.c, x, p.slack);
  double worst = 0.0;
  for (int j = 0; j < set.n; ++j) {
    const double h = p.slack[j] + p.beta[j] - m * p.s[j];
    if (p.s[j] > 0.0) worst = max_of(worst, x[j] > 0.0 ? std::fabs(h) : -h);
    scale += x[j];
  }
  return worst / scale;
}

// Whether x'C x is the squared radius to the error of C, after mismatch(), which leaves C x in
// p.slack.
FASTMTO_INLINE bool reached(const Path& p, int n, double radius2) {
  const int ld = p.cone.set.ld;
  const double off = std::fabs(dot(ld, p.cone.x, p.slack) - radius2);
  const double sum_x = total(ld, p.cone.x);
  return off <= kAccepted * radius2 + 8.0 * n * p.cone.level * sum_x * sum_x;
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
  p.b = arena.take(ld);
  p.cone = carve_cone(n, ld, t.c, p.b, &arena);
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
  // |g0|^2 is known to within eps of the square of the lengths summed.
  if (!(mean2 > 4.0 * kEps * eta_sum * eta_sum)) return Status::kSolved;
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
  const double lowest = m;
  append(&p.set, start, project(p.set, start));
  // Beyond this sum of x, eps of it is as long as the radius: only the direction of rounding.
  const double most = std::sqrt(radius2 / (16.0 * n * kEps));
  m = follow(&p, &p.set, m, ceiling, radius2, most, 20 * n + 100, &info->iterations);
  double* x = p.cone.x;
  for (int j = 0; j < ld; ++j) x[j] = 0.0;
  for (int i = 0; i < p.set.size; ++i) x[p.set.index[i]] = p.x[i];
  double residual = mismatch(p, p.set, m, eta_sum);
  // Where lengths are 20 decades apart m loses its digits on the way.
  if (!(residual <= kAccepted) || !(m >= ceiling || reached(p, n, radius2))) {
    // One task alone would reach the radius at `highest`, all together not later.
    const double highest = min_of(ceiling, lowest + std::sqrt(radius2) / p.s[start]);
    bool jumps;
    m = search(&p, lowest, highest, radius2, most, &info->iterations, &jumps);
    residual = mismatch(p, p.cone.set, m, eta_sum);
    if (!(m >= ceiling || jumps || reached(p, n, radius2))) return Status::kMaxIterations;
  }
  info->residual = residual;
  for (int j = 0; j < n; ++j) weights[j] = share * (1.0 + x[j] * (longest * t.s[j]));
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
