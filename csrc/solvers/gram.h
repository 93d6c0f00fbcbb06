// What every solver does with its Gram matrix first: check it, and take it apart into lengths and
// cosines. Internal to this folder.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>

#include "linalg.h"
#include "status.h"

namespace fastmto::solvers {

constexpr double kEps = DBL_EPSILON;
// A float32 Gram matrix can put the cosine of two equal updates this far above 1.
constexpr double kCosineSlack = 1e-3;
// Relative to sqrt(gram[i][i] gram[j][j]); float32 matrix products are symmetric to about 1e-6.
constexpr double kAsymmetry = 1e-5;

FASTMTO_INLINE double max_of(double a, double b) { return a > b ? a : b; }
FASTMTO_INLINE double min_of(double a, double b) { return a < b ? a : b; }

// Hands out the workspace; the *_workspace() functions of the headers are the totals.
struct Arena {
  double* next;
  FASTMTO_INLINE double* take(std::size_t count) {
    double* p = next;
    next += count;
    return p;
  }
  FASTMTO_INLINE std::int32_t* take_integers(std::size_t count) {
    return new (take(padded(static_cast<int>((count + 1) / 2)))) std::int32_t[count];
  }
};

// Names what is wrong with a matrix that a fast check has refused, or kSolved where nothing is but
// updates of length zero. A diagonal entry that is subnormal counts as zero.
inline Status diagnose(int n, const double* g, bool zeros_allowed) {
  const auto at = [&](int i, int j) { return g[static_cast<std::ptrdiff_t>(i) * n + j]; };
  bool zero = false, negative = false, wrong = false;
  for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(n) * n; ++i) {
    if (!(std::fabs(g[i]) <= DBL_MAX)) return Status::kNotFinite;
  }
  for (int i = 0; i < n; ++i) {
    zero = zero || std::fabs(at(i, i)) < DBL_MIN;
    negative = negative || at(i, i) <= -DBL_MIN;
  }
  if (zero && !zeros_allowed) return Status::kZeroUpdate;
  if (negative) return Status::kNotPsd;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      // A zero update counts as one of the largest length that is zero.
      const double length = std::sqrt(max_of(at(i, i), DBL_MIN)) *
                            std::sqrt(max_of(at(j, j), DBL_MIN));
      if (!(std::fabs(at(i, j) - at(j, i)) <= kAsymmetry * length)) return Status::kNotSymmetric;
      wrong = wrong || !(0.5 * std::fabs(at(i, j) + at(j, i)) <= (1.0 + kCosineSlack) * length);
    }
  }
  return wrong || !zeros_allowed ? Status::kNotPsd : Status::kSolved;
}

// Lengths and cosines of the tasks.
struct Cosines {
  double* c;       // (n, ld): correlation matrix, symmetrised; rows and columns of zero updates zero
  double* length;  // (ld): roots of the diagonal, 0 for zero updates and from n on
  double* s;       // (ld): 1 / length, 0 where that is 0
  int zeros;       // zero updates
};

constexpr std::size_t cosines_workspace(int tasks) {
  return static_cast<std::size_t>(padded(tasks)) * (static_cast<std::size_t>(tasks) + 2);
}

FASTMTO_INLINE Cosines carve_cosines(int n, int ld, Arena* arena) {
  Cosines t;
  t.c = arena->take(static_cast<std::size_t>(n) * ld);
  t.length = arena->take(ld);
  t.s = arena->take(ld);
  t.zeros = 0;
  return t;
}

FASTMTO_INLINE Status take_apart(int n, int ld, const double* gram, bool zeros_allowed,
                                 Cosines* t) {
  bool good = true;
  bool positive = true;
  for (int i = 0; i < n; ++i) {
    const double d = gram[static_cast<std::ptrdiff_t>(i) * n + i];
    positive &= d >= DBL_MIN && d <= DBL_MAX;
    t->length[i] = d;
  }
  for (int i = n; i < ld; ++i) t->length[i] = 1.0;
  t->zeros = 0;
  if (!positive) {
    const Status status = diagnose(n, gram, zeros_allowed);
    if (status != Status::kSolved) return status;
  }
  for (int i = 0; i < ld; ++i) {
    t->length[i] = std::sqrt(t->length[i]);
    t->s[i] = 1.0 / t->length[i];
  }
  for (int i = n; i < ld; ++i) t->length[i] = t->s[i] = 0.0;
  if (!positive) {
    for (int i = 0; i < n; ++i) {
      if (!(gram[static_cast<std::ptrdiff_t>(i) * n + i] < DBL_MIN)) continue;
      t->length[i] = t->s[i] = 0.0;
      ++t->zeros;
    }
  }
  for (int i = 0; i < n; ++i) {
    const double* g = gram + static_cast<std::ptrdiff_t>(i) * n;
    double* row = t->c + static_cast<std::ptrdiff_t>(i) * ld;
    const double si = t->s[i];
    // One factor at a time: the product of two may overflow.
    for (int j = 0; j < n; ++j) row[j] = g[j] * si * t->s[j];
    for (int j = n; j < ld; ++j) row[j] = 0.0;
  }
  for (int i = 0; i < n; ++i) {
    double* row = t->c + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = 0; j < i; ++j) {
      double* other = t->c + static_cast<std::ptrdiff_t>(j) * ld + i;
      const double x = 0.5 * (row[j] + *other);
      good &= std::fabs(x) <= 1.0 + kCosineSlack && std::fabs(row[j] - *other) <= kAsymmetry;
      row[j] = x;
      *other = x;
    }
    row[i] = t->s[i] > 0.0 ? 1.0 : 0.0;
  }
  if (good) return Status::kSolved;
  const Status status = diagnose(n, gram, zeros_allowed);
  return status == Status::kSolved ? Status::kNotPsd : status;
}

}  // namespace fastmto::solvers
