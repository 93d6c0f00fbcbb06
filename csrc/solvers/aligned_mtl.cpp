// See aligned_mtl.h.

#include "aligned_mtl.h"

#include "dispatch.h"
#include "gram.h"

namespace fastmto::solvers {
namespace {

// An eigenvalue this far below 0, of the largest, is not rounding even of a float32 Gram matrix.
constexpr double kIndefinite = 1e-3;
constexpr int kMaxSweeps = 60;  // for one eigenvalue
// Beside a largest diagonal entry of 1; its square is still a normal number.
constexpr double kNothing = 1e-120;

struct Eigen {
  double* a;          // (n, ld) the matrix; row k becomes the reflector of step k
  double* d;          // (ld) diagonal, then eigenvalues
  double* e;          // (ld) e[i] couples i and i + 1
  double* tau;        // (ld) factors of the reflectors
  double* x;          // (ld) the vector that follows
  double* p;          // (ld) scratch
  double* rotations;  // cosine and sine of each rotation, in order
  double* end;        // of them
  std::int32_t* from;  // (sweeps) a sweep rotates rows from - 1 and from, ..., to and to + 1
  std::int32_t* to;    // (sweeps)
  int sweeps;
};

// a -> tridiagonal, by reflectors I - tau v v'; x <- Q'x.
FASTMTO_INLINE void tridiagonalise(int n, int ld, const Eigen& f) {
  for (int k = 0; k < n; ++k) {
    double* v = f.a + static_cast<std::ptrdiff_t>(k) * ld;
    f.d[k] = v[k];
    f.e[k] = k + 1 < n ? v[k + 1] : 0.0;
    f.tau[k] = 0.0;
    if (k + 2 >= n) continue;
    const int first = (k + 1) / kLanes * kLanes;
    for (int j = first; j <= k; ++j) v[j] = 0.0;
    double below = 0.0;
    for (int j = k + 2; j < n; ++j) below += v[j] * v[j];
    if (!(below > kNothing)) continue;
    const double head = v[k + 1];
    const double norm = std::sqrt(head * head + below);
    f.e[k] = head > 0.0 ? -norm : norm;
    v[k + 1] = head - f.e[k];
    const double tau = 2.0 / (v[k + 1] * v[k + 1] + below);
    f.tau[k] = tau;
    // p = tau A v over the rows from k + 1 on (A is symmetric and kept whole).
    for (int j = first; j < ld; j += kLanes) pack(f.p + j) = Pack{};
    for (int i = k + 1; i < n; ++i) {
      const double* row = f.a + static_cast<std::ptrdiff_t>(i) * ld;
      const double factor = tau * v[i];
      for (int j = first; j < ld; j += kLanes) pack(f.p + j) += factor * pack(row + j);
    }
    const double half = 0.5 * tau * dot(ld - first, f.p + first, v + first);
    for (int j = first; j < ld; j += kLanes) pack(f.p + j) -= half * pack(v + j);
    for (int i = k + 1; i < n; ++i) {
      double* row = f.a + static_cast<std::ptrdiff_t>(i) * ld;
      const double vi = v[i];
      const double pi = f.p[i];
      for (int j = first; j < ld; j += kLanes)
        pack(row + j) -= vi * pack(f.p + j) + pi * pack(v + j);
    }
    const double along = tau * dot(ld - first, v + first, f.x + first);
    for (int j = first; j < ld; j += kLanes) pack(f.x + j) -= along * pack(v + j);
  }
}

// x <- Q x.
FASTMTO_INLINE void reflect_back(int n, int ld, const Eigen& f) {
  for (int k = n - 3; k >= 0; --k) {
    if (f.tau[k] == 0.0) continue;
    const double* v = f.a + static_cast<std::ptrdiff_t>(k) * ld;
    const int first = (k + 1) / kLanes * kLanes;
    const double along = f.tau[k] * dot(ld - first, v + first, f.x + first);
    for (int j = first; j < ld; j += kLanes) pack(f.x + j) -= along * pack(v + j);
  }
}

// d <- eigenvalues of the tridiagonal matrix by QL with Wilkinson's shift, x <- Z'x for its
// eigenvectors Z. False if it does not converge. What the next rotation needs stays in registers: a
// stored neighbour that is read back at once would stall.
FASTMTO_INLINE bool diagonalise(int n, int capacity, Eigen* eigen) {
  const Eigen& f = *eigen;
  double* next = f.rotations;
  const double* last = f.rotations + 2 * static_cast<std::ptrdiff_t>(capacity);
  int sweeps = 0;
  for (int l = 0; l < n; ++l) {
    for (int sweep = 0;; ++sweep) {
      int m = l;
      while (m + 1 < n &&
             std::fabs(f.e[m]) > kNothing + kEps * (std::fabs(f.d[m]) + std::fabs(f.d[m + 1])))
        ++m;
      if (m == l) break;
      if (sweep == kMaxSweeps || next + 2 * (m - l) > last || sweeps == capacity) return false;
      const double slope = 0.5 * (f.d[l + 1] - f.d[l]) / f.e[l];
      const double root = std::sqrt(slope * slope + 1.0);
      double g = f.d[m] - f.d[l] + f.e[l] / (slope + (slope < 0.0 ? -root : root));
      double s = 1.0, c = 1.0, s2 = 1.0, shift = 0.0;
      double high = f.x[m];
      double diagonal = f.d[m];
      int i = m - 1;
      for (; i >= l; --i) {
        const double h = s * f.e[i];
        const double b = c * f.e[i];
        const double square = s2 * (f.e[i] * f.e[i]) + g * g;
        if (!(square >= DBL_MIN)) {
          f.e[i + 1] = 0.0;
          break;
        }
        // Written so that from one g to the next there is a quotient and no root.
        const double r = std::sqrt(square);
        const double quotient = 1.0 / square;
        const double g_part = g * quotient;
        const double h_part = h * quotient;
        const double c2 = g * g_part;
        const double cs = h * g_part;
        s2 = h * h_part;
        c = r * g_part;
        s = r * h_part;
        f.e[i + 1] = r;
        const double before = diagonal - shift;
        diagonal = f.d[i];
        const double apart = diagonal - before;
        shift = s2 * apart + 2.0 * (cs * b);
        f.d[i + 1] = before + shift;
        g = cs * apart + (c2 - s2) * b;
        const double low = f.x[i];
        f.x[i + 1] = s * low + c * high;
        high = c * low - s * high;
        next[0] = c;
        next[1] = s;
        next += 2;
      }
      f.x[i + 1] = high;
      f.from[sweeps] = m;
      f.to[sweeps++] = i + 1;
      f.d[i + 1] = diagonal - shift;
      if (i < l) f.e[l] = g;
      f.e[m] = 0.0;
    }
  }
  eigen->sweeps = sweeps;
  eigen->end = next;
  return true;
}

// x <- Z x.
FASTMTO_INLINE void rotate_back(const Eigen& f) {
  const double* next = f.end;
  for (int k = f.sweeps - 1; k >= 0; --k) {
    double low = f.x[f.to[k]];
    for (int i = f.to[k]; i < f.from[k]; ++i) {
      next -= 2;
      const double high = f.x[i + 1];
      f.x[i] = next[0] * low + next[1] * high;
      low = next[0] * high - next[1] * low;
    }
    f.x[f.from[k]] = low;
  }
}

// sigma^2: the smallest, the lower median or the mean of the eigenvalues above the cut.
FASTMTO_INLINE double squared_scale(int n, double cut, Scale scale, const double* lambda,
                                    double* kept) {
  int rank = 0;
  double sum = 0.0;
  for (int i = 0; i < n; ++i) {
    if (!(lambda[i] > cut)) continue;
    int k = rank++;
    for (; k > 0 && kept[k - 1] > lambda[i]; --k) kept[k] = kept[k - 1];
    kept[k] = lambda[i];
    sum += lambda[i];
  }
  if (scale == Scale::kMin) return kept[0];
  return scale == Scale::kMedian ? kept[(rank - 1) / 2] : sum / rank;
}

FASTMTO_INLINE Status aligned_mtl_body(int n, const double* gram, Scale scale, double eps,
                                       double* workspace, double* weights, Info* info) {
  *info = Info{0, 0.0, 0.0};
  const int ld = padded(n);
  const int capacity = 2 * n * ld;
  Arena arena{workspace};
  Eigen f;
  f.a = arena.take(static_cast<std::size_t>(n) * ld);
  f.d = arena.take(ld);
  f.e = arena.take(ld);
  f.tau = arena.take(ld);
  f.x = arena.take(ld);
  f.p = arena.take(ld);
  f.rotations = arena.take(2 * static_cast<std::size_t>(capacity));
  f.from = arena.take_integers(capacity);
  f.to = arena.take_integers(capacity);
  f.end = f.rotations;
  f.sweeps = 0;
  double longest = 0.0;
  bool finite = true;
  for (int i = 0; i < n; ++i) {
    const double d = gram[static_cast<std::ptrdiff_t>(i) * n + i];
    finite &= d > -DBL_MIN && d <= DBL_MAX;
    longest = max_of(longest, d);
  }
  const double share = 1.0 / n;
  if (!finite || longest < DBL_MIN) {
    const Status status = diagnose(n, gram, true);
    if (status != Status::kSolved) return status;
    for (int i = 0; i < n; ++i) weights[i] = share;
    return Status::kSolved;
  }
  // In units of the largest entry; symmetric to what the lengths of the rows allow.
  const double unit = 1.0 / longest;
  bool good = true;
  for (int i = 0; i < n; ++i) {
    const double* g = gram + static_cast<std::ptrdiff_t>(i) * n;
    double* row = f.a + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = 0; j < n; ++j) row[j] = g[j] * unit;
    for (int j = n; j < ld; ++j) row[j] = 0.0;
  }
  for (int i = 0; i < n; ++i) {
    double* row = f.a + static_cast<std::ptrdiff_t>(i) * ld;
    f.d[i] = row[i];
    for (int j = 0; j < i; ++j) {
      double* other = f.a + static_cast<std::ptrdiff_t>(j) * ld + i;
      const double x = 0.5 * (row[j] + *other);
      const double apart = row[j] - *other;
      const double square = f.d[i] * f.d[j];
      good &= apart * apart <= kAsymmetry * kAsymmetry * square &&
              x * x <= (1.0 + kCosineSlack) * (1.0 + kCosineSlack) * square;
      row[j] = x;
      *other = x;
    }
  }
  if (!good) {
    // Squares of very different lengths underflow: the exact test decides.
    const Status status = diagnose(n, gram, true);
    if (status != Status::kSolved) return status;
  }
  for (int i = 0; i < ld; ++i) f.x[i] = i < n ? share : 0.0;
  tridiagonalise(n, ld, f);
  if (!diagonalise(n, capacity, &f)) return Status::kMaxIterations;
  info->iterations = f.sweeps;
  double largest_value = f.d[0], smallest_value = f.d[0];
  for (int i = 1; i < n; ++i) {
    largest_value = max_of(largest_value, f.d[i]);
    smallest_value = min_of(smallest_value, f.d[i]);
  }
  if (smallest_value < -kIndefinite * largest_value) return Status::kNotPsd;
  const double cut = largest_value * min_of(n * max_of(eps, kEps), 1.0 - kEps);
  const double square = squared_scale(n, cut, scale, f.d, f.p);
  info->kappa = largest_value / f.p[0];
  for (int i = 0; i < n; ++i)
    f.x[i] = f.d[i] > cut ? f.x[i] * std::sqrt(square / f.d[i]) : 0.0;
  rotate_back(f);
  reflect_back(n, ld, f);
  for (int i = 0; i < n; ++i) weights[i] = f.x[i];
  return Status::kSolved;
}

FASTMTO_DISPATCH(aligned_mtl_body,
                 (int n, const double* gram, Scale scale, double eps, double* workspace,
                  double* weights, Info* info),
                 (n, gram, scale, eps, workspace, weights, info))

}  // namespace

Status aligned_mtl(int tasks, const double* gram, Scale scale, double eps, double* workspace,
                   double* weights, Info* info) {
  return aligned_mtl_body_chosen(tasks, gram, scale, eps, workspace, weights, info);
}

}  // namespace fastmto::solvers
