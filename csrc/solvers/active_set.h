// The two tools of the quadratic programs on the correlation matrix C: a factor of C on a set of
// tasks that grows and shrinks, and, on it,
//
//     minimise x'C x / 2 - b'x   subject to   x >= 0.                                        (1)
//
// Internal to this folder. C is (n, ld), diagonal 1 (0 for a zero update, which is never put in a
// set), positive semidefinite up to rounding.
#pragma once

#include "gram.h"

namespace fastmto::solvers {

// A pivot below this times the order times the level of rounding is none: that task depends on
// those before.
constexpr double kDependent = 16.0;
// Indefiniteness beyond this is not rounding, not even that of a float32 Gram matrix.
constexpr double kIndefinite = 1e-3;

struct ActiveSet {
  int n;
  int ld;
  int size;             // tasks in the set
  const double* c;
  double* a;            // (n, ld) factor of C on the set, as factor() leaves it
  double* inverse;      // (ld) 1 / d
  double* pivot;        // (ld) d
  double* column;       // (ld) D^-1 L^-1 C_Sj of the task last projected
  std::int32_t* index;  // (n) position -> task
  std::int32_t* place;  // (n) task -> position, -1 outside the set
};

constexpr std::size_t active_set_workspace(int tasks) {
  return static_cast<std::size_t>(padded(tasks)) * (static_cast<std::size_t>(tasks) + 5);
}

FASTMTO_INLINE ActiveSet carve_active_set(int n, int ld, const double* c, Arena* arena) {
  ActiveSet s;
  s.n = n;
  s.ld = ld;
  s.size = 0;
  s.c = c;
  s.a = arena->take(static_cast<std::size_t>(n) * ld);
  s.inverse = arena->take(ld);
  s.pivot = arena->take(ld);
  s.column = arena->take(ld);
  s.index = arena->take_integers(ld);
  s.place = arena->take_integers(ld);
  for (int i = 0; i < n; ++i) s.place[i] = -1;
  return s;
}

FASTMTO_INLINE void clear(ActiveSet* s) {
  for (int i = 0; i < s->size; ++i) s->place[s->index[i]] = -1;
  s->size = 0;
}

// column <- D^-1 L^-1 C_Sj, and the pivot that task j would have.
FASTMTO_INLINE double project(const ActiveSet& s, int j) {
  const double* row = s.c + static_cast<std::ptrdiff_t>(j) * s.ld;
  const int width = padded(s.size);
  for (int i = 0; i < s.size; ++i) s.column[i] = row[s.index[i]];
  for (int i = s.size; i < width; ++i) s.column[i] = 0.0;
  forward(s.size, width, s.ld, s.a, s.inverse, s.column);
  double d = row[j];
  for (int i = 0; i < s.size; ++i) d -= s.column[i] * s.column[i] * s.pivot[i];
  return d;
}

FASTMTO_INLINE double smallest_pivot(const ActiveSet& s, double level) {
  return kDependent * level * (s.size + 1);
}

// Puts the task last projected, with its pivot, into the set.
FASTMTO_INLINE void append(ActiveSet* s, int j, double d) {
  const int k = s->size;
  for (int i = 0; i < k; ++i)
    s->a[static_cast<std::ptrdiff_t>(i) * s->ld + k] = s->column[i] * s->pivot[i];
  double* row = s->a + static_cast<std::ptrdiff_t>(k) * s->ld;
  for (int i = k / kLanes * kLanes; i < s->ld; i += kLanes) pack(row + i) = Pack{};
  s->pivot[k] = d;
  s->inverse[k] = 1.0 / d;
  s->index[k] = j;
  s->place[j] = k;
  s->size = k + 1;
}

// Takes the task at a position out: the rows behind it change by one of rank one.
FASTMTO_INLINE void remove(ActiveSet* s, int position) {
  const int k = s->size;
  const int width = padded(k);
  double* w = s->column;
  double alpha = s->pivot[position];
  {
    const double* row = s->a + static_cast<std::ptrdiff_t>(position) * s->ld;
    const int first = position / kLanes * kLanes;  // 0 up to the diagonal
    for (int r = first; r < width; ++r) w[r] = row[r] * s->inverse[position];
  }
  for (int j = position + 1; j < k; ++j) {
    double* row = s->a + static_cast<std::ptrdiff_t>(j) * s->ld;
    const double p = w[j];
    const double d = s->pivot[j] + alpha * p * p;
    const double beta = p * alpha / d;
    const double old_inverse = s->inverse[j];
    alpha *= s->pivot[j] / d;
    for (int r = j / kLanes * kLanes; r < width; r += kLanes) {
      const Pack l = pack(row + r) * old_inverse;
      const Pack moved = pack(w + r) - p * l;
      // Entries up to the diagonal stay 0: those of w are no longer needed.
      pack(w + r) = moved;
      pack(row + r) = d * (l + beta * moved);
    }
    for (int r = j / kLanes * kLanes; r <= j; ++r) row[r] = 0.0;
    s->pivot[j] = d;
    s->inverse[j] = 1.0 / d;
  }
  s->place[s->index[position]] = -1;
  for (int i = 0; i < position; ++i) {
    double* row = s->a + static_cast<std::ptrdiff_t>(i) * s->ld;
    for (int r = position; r + 1 < k; ++r) row[r] = row[r + 1];
    row[k - 1] = 0.0;
  }
  for (int j = position + 1; j < k; ++j) {
    const double* from = s->a + static_cast<std::ptrdiff_t>(j) * s->ld;
    double* to = s->a + static_cast<std::ptrdiff_t>(j - 1) * s->ld;
    for (int r = (j - 1) / kLanes * kLanes; r < j; ++r) to[r] = 0.0;
    for (int r = j; r + 1 < k; ++r) to[r] = from[r + 1];
    to[k - 1] = 0.0;
    s->pivot[j - 1] = s->pivot[j];
    s->inverse[j - 1] = s->inverse[j];
    s->index[j - 1] = s->index[j];
    s->place[s->index[j - 1]] = j - 1;
  }
  s->size = k - 1;
}

// z <- C_SS^-1 b_S, in the order of the set; z (ld), b (n) by task.
FASTMTO_INLINE void solve_on(const ActiveSet& s, const double* b, double* z) {
  const int width = padded(s.size);
  for (int i = 0; i < s.size; ++i) z[i] = b[s.index[i]];
  for (int i = s.size; i < width; ++i) z[i] = 0.0;
  if (s.size == 0) return;
  forward(s.size, width, s.ld, s.a, s.inverse, z);
  backward(s.size, width, s.ld, s.a, s.inverse, z);
}

// q_S <- -C_SS^-1 C_Sj in the order of the set, from the column last projected: with q_j = 1 the
// direction in which only (C q)_j changes.
FASTMTO_INLINE void null_direction(const ActiveSet& s, double* q) {
  const int width = padded(s.size);
  for (int i = 0; i < width; ++i) q[i] = -s.column[i];
  if (s.size > 0) backward(s.size, width, s.ld, s.a, s.inverse, q);
}

template <int kPacks>
FASTMTO_INLINE void accumulate_columns(const ActiveSet& s, int j, const double* z, double sign,
                                       double* out) {
  Pack acc[kPacks];
  for (int b = 0; b < kPacks; ++b) acc[b] = pack(out + j + b * kLanes);
  for (int i = 0; i < s.size; ++i) {
    const double* row = s.c + static_cast<std::ptrdiff_t>(s.index[i]) * s.ld + j;
    for (int b = 0; b < kPacks; ++b) acc[b] += sign * z[i] * pack(row + b * kLanes);
  }
  for (int b = 0; b < kPacks; ++b) pack(out + j + b * kLanes) = acc[b];
}

// out (ld) += sign * C z for z on the set, in its order.
FASTMTO_INLINE void accumulate(const ActiveSet& s, const double* z, double sign, double* out) {
  int j = 0;
  for (; j + 4 * kLanes <= s.ld; j += 4 * kLanes) accumulate_columns<4>(s, j, z, sign, out);
  for (; j < s.ld; j += kLanes) accumulate_columns<1>(s, j, z, sign, out);
}

enum class End {
  kOptimal,
  kIndefinite,  // C has a negative direction beyond kIndefinite
  kLimit,       // more steps than the method can need
};

struct Cone {
  ActiveSet set;
  const double* b;  // (ld) right-hand side, 0 for zero updates and from n on
  double* x;        // (ld) out, by task
  double* r;        // (ld) out: b - C x
  double* z;        // (ld) in the order of the set
  double* wrong;    // (ld) 1 for infeasible tasks
  double* held;     // (ld) 1 for tasks that rounding keeps out of the set
  double level;     // relative error of C: eps, or the negative direction met so far
  double x_sum;     // out: sum of x
  int steps;        // out: factorisations and exchanges
};

constexpr std::size_t cone_workspace(int tasks) {
  return active_set_workspace(tasks) + static_cast<std::size_t>(padded(tasks)) * 5;
}

FASTMTO_INLINE Cone carve_cone(int n, int ld, const double* c, const double* b, Arena* arena) {
  Cone t;
  t.set = carve_active_set(n, ld, c, arena);
  t.b = b;
  t.x = arena->take(ld);
  t.r = arena->take(ld);
  t.z = arena->take(ld);
  t.wrong = arena->take(ld);
  t.held = arena->take(ld);
  t.level = kEps;
  t.x_sum = 0.0;
  t.steps = 0;
  return t;
}

// What rounding leaves of a zero entry of r.
FASTMTO_INLINE double noise(const Cone& t, int j) {
  return (8.0 + t.set.size) * t.level * (std::fabs(t.b[j]) + t.x_sum);
}

// x, its sum and r from z on the set.
FASTMTO_INLINE void settle(Cone* t) {
  const ActiveSet& s = t->set;
  for (int j = 0; j < s.ld; j += kLanes) {
    pack(t->x + j) = Pack{};
    pack(t->r + j) = pack(t->b + j);
  }
  t->x_sum = 0.0;
  for (int i = 0; i < s.size; ++i) {
    t->x[s.index[i]] = t->z[i];
    t->x_sum += std::fabs(t->z[i]);
  }
  accumulate(s, t->z, -1.0, t->r);
}

// Factor and z of the set whose tasks have place >= 0. False, with an empty set, where they are
// not independent.
FASTMTO_INLINE bool refactor(Cone* t) {
  ActiveSet* s = &t->set;
  ++t->steps;
  s->size = 0;
  for (int j = 0; j < s->n; ++j) {
    if (s->place[j] < 0) continue;
    s->place[j] = s->size;
    s->index[s->size++] = j;
  }
  const int k = s->size;
  const int width = padded(k);
  for (int i = 0; i < k; ++i) {
    const double* from = s->c + static_cast<std::ptrdiff_t>(s->index[i]) * s->ld;
    double* to = s->a + static_cast<std::ptrdiff_t>(i) * s->ld;
    for (int j = i / kLanes * kLanes; j < k; ++j) to[j] = from[s->index[j]];
    for (int j = k; j < s->ld; ++j) to[j] = 0.0;
  }
  bool good = factor<4>(k, width, s->ld, s->a, s->inverse);
  for (int i = 0; good && i < k; ++i) {
    s->pivot[i] = 1.0 / s->inverse[i];
    good = s->pivot[i] > kDependent * t->level * (i + 1);
  }
  if (!good) {
    clear(s);
    return false;
  }
  solve_on(*s, t->b, t->z);
  return true;
}

// Block principal pivoting (Portugal, Judice, Vicente 1994): exchange all infeasible tasks at once
// while their number falls. Ends at the solution (true), or at a set with z > 0, or an empty one,
// from which single exchanges go on.
FASTMTO_INLINE bool exchange_blocks(Cone* t) {
  constexpr int kPatience = 3;
  ActiveSet* s = &t->set;
  int fewest = s->n + 1;
  int patience = kPatience;
  for (int j = 0; j < s->n; ++j) s->place[j] = t->b[j] > 0.0 ? 0 : -1;
  for (;;) {
    if (!refactor(t)) break;
    settle(t);
    int infeasible = 0;
    for (int j = 0; j < s->n; ++j) {
      const bool wrong = s->place[j] >= 0 ? t->x[j] < 0.0 : t->r[j] > noise(*t, j);
      t->wrong[j] = wrong ? 1.0 : 0.0;
      infeasible += wrong;
    }
    if (infeasible == 0) return true;
    if (infeasible < fewest) {
      fewest = infeasible;
      patience = kPatience;
    } else if (--patience < 0) {
      break;
    }
    for (int j = 0; j < s->n; ++j) {
      if (t->wrong[j] != 0.0) s->place[j] = s->place[j] >= 0 ? -1 : 0;
    }
  }
  bool negative = s->size > 0;
  while (negative) {
    negative = false;
    for (int i = s->size - 1; i >= 0; --i) {
      if (t->z[i] > 0.0) continue;
      s->place[s->index[i]] = -1;
      negative = true;
    }
    if (negative && !refactor(t)) negative = false;
  }
  settle(t);
  return false;
}

// From x feasible and z optimal on the set: x moves to z, dropping the tasks that reach 0 on the
// way, until z > 0. False, and x unchanged, if the task that entered last would have to leave at
// once: solved exactly its z is positive, so what let it in was rounding.
FASTMTO_INLINE bool move_inside(Cone* t) {
  ActiveSet* s = &t->set;
  bool first = true;
  for (;;) {
    solve_on(*s, t->b, t->z);
    if (first && !(t->z[s->size - 1] > 0.0)) return false;
    first = false;
    double part = 1.0;
    int blocks = -1;
    for (int i = 0; i < s->size; ++i) {
      if (t->z[i] > 0.0) continue;
      const double x = t->x[s->index[i]];
      const double reach = x > 0.0 ? x / (x - t->z[i]) : 0.0;
      if (blocks >= 0 && !(reach < part)) continue;
      part = reach;
      blocks = i;
    }
    if (blocks < 0) return true;
    if (!(part > 0.0)) part = 0.0;
    ++t->steps;
    for (int i = s->size - 1; i >= 0; --i) {
      double* x = t->x + s->index[i];
      if (part > 0.0) *x += part * (t->z[i] - *x);
      if (i != blocks && *x > 0.0) continue;
      *x = 0.0;
      remove(s, i);
      for (int k = i; k < s->size; ++k) t->z[k] = t->z[k + 1];
    }
    if (s->size == 0) return true;
  }
}

// Problem (1): block exchanges, then single ones (Lawson and Hanson 1974, chapter 23, on C).
//
// A task that depends on the set enters with the smallest pivot that is not rounding: a ridge of
// that relative size on its own cosine, and the only one. So the minimum is finite: where b'x has
// none, x grows until rounding hides the rest, along the direction that it would take for ever.
FASTMTO_INLINE End minimise(Cone* t) {
  ActiveSet* s = &t->set;
  const int limit = 10 * s->n + 50;
  t->steps = 0;
  t->level = kEps;
  if (exchange_blocks(t)) return End::kOptimal;
  double reached = -DBL_MAX;  // -2 times the objective, which falls
  for (int j = 0; j < s->n; ++j) t->held[j] = 0.0;
  while (t->steps < limit) {
    int enter = -1;
    double most = 0.0;
    for (int j = 0; j < s->n; ++j) {
      if (s->place[j] >= 0 || t->held[j] != 0.0 || !(s->c[j * (s->ld + std::ptrdiff_t{1})] > 0.0))
        continue;
      if (t->r[j] > noise(*t, j) && t->r[j] > most) {
        most = t->r[j];
        enter = j;
      }
    }
    if (enter < 0) return End::kOptimal;
    ++t->steps;
    const double d = project(*s, enter);
    if (d < -smallest_pivot(*s, t->level)) {
      // C is not known better than this.
      if (-d > kIndefinite) return End::kIndefinite;
      t->level = -d / (s->size + 1);
      continue;
    }
    append(s, enter, max_of(d, smallest_pivot(*s, t->level)));
    if (!move_inside(t)) {
      remove(s, s->size - 1);
      t->held[enter] = 1.0;
      continue;
    }
    settle(t);
    double gain = 0.0;
    for (int i = 0; i < s->size; ++i) gain += t->z[i] * t->b[s->index[i]];
    // Not falling any more: rounding.
    if (!(gain > reached)) return End::kOptimal;
    reached = gain;
    for (int j = 0; j < s->n; ++j) t->held[j] = 0.0;
  }
  return End::kLimit;
}

// Largest violation of the optimality conditions of (1), relative to `scale` + sum x.
FASTMTO_INLINE double violation(const Cone& t, double scale) {
  double worst = 0.0;
  for (int j = 0; j < t.set.n; ++j) {
    const double v = t.x[j] > 0.0 ? std::fabs(t.r[j]) : t.r[j];
    worst = max_of(worst, v);
  }
  return worst > 0.0 ? worst / (scale + t.x_sum) : 0.0;
}

}  // namespace fastmto::solvers
