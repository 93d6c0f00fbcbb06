// See bargaining.h. Notation: C the correlation matrix, s_i = 1/sqrt(gram[i][i]), y = a / s,
// p scaled to sum T, M = diag(y) C diag(y).

#include "bargaining.h"

#include <cfloat>
#include <cmath>

#include "dispatch.h"
#include "gram.h"
#include "linalg.h"

namespace fastmto::solvers {
namespace {

constexpr int kMaxNewton = 100;
constexpr int kMaxLineSearch = 40;
constexpr int kMaxInterior = 60;
constexpr int kMaxBarrier = 500;
constexpr double kStepTolerance = 1e-9;
// Interior point: relative gap and residuals at which the polish takes over.
constexpr double kGap = 1e-12;
constexpr double kFeasible = 1e-8;
// Barrier: its relative gap, and the one accepted where rounding ends the path before.
constexpr double kBarrierGap = 1e-12;
constexpr double kRoundedGap = 1e-6;
// Polish: a constraint is active if lam > kActive * z * (objective); its equation is softened by
// kSoftness / lam.
constexpr double kActive = 1e-3;
constexpr double kSoftness = 1e-8;
constexpr int kMaxPolish = 8;
// Diagonal entries beyond this make a free and a dependent change trade places.
constexpr double kPivot = 4.0;

// What one solve works on; all vectors (ld) with zeros from n on, matrices (n, ld).
struct Exact {
  double* c;      // correlation matrix, symmetrised, 1 + ridge on the diagonal
  double* s;
  double* p;      // preferences scaled to sum T
  double* p_inv;
  double* y;
  double* a;      // diag(p) + M, factored
  double* d_inv;  // inverse pivots of a
  double* r;
  double* w;      // y .* C y
  double* z;
};

struct Interior {
  double* m;      // M at the exact solution
  double* n;      // how the dependent relative changes follow the free ones: see basis()
  double* h;      // normal matrix
  double* c;      // q + M w
  double* q;      // objective q'y + w's
  double* w;
  double* v;      // 1 / a*
  double* y_prev;
  double* s_prev;
  double* vertex;  // inverse pivots of the factor of diag(p) + M
  double* slope;   // (diag(p) + M)^-1 c
  double* y;
  double* s;      // M y, kept beside y: it cannot be computed from y where it is much smaller
  double* free_s; // 1 where the change of s is free and that of y dependent, else 0
  double* drift;  // in the dependent change: what takes s - M y to 0
  double* lam;
  double* z;
  double* u;
  double* dz;
  double* dlam;
  double* rd;
  double* rp;
  double* e;
  double* t;
};

FASTMTO_INLINE Exact carve_exact(int n, int ld, Arena* arena) {
  const std::size_t matrix = static_cast<std::size_t>(n) * ld;
  Exact e;
  e.c = arena->take(matrix);
  e.a = arena->take(matrix);
  e.s = arena->take(ld);
  e.p = arena->take(ld);
  e.p_inv = arena->take(ld);
  e.y = arena->take(ld);
  e.d_inv = arena->take(ld);
  e.r = arena->take(ld);
  e.w = arena->take(ld);
  e.z = arena->take(ld);
  return e;
}

FASTMTO_INLINE Interior carve_interior(int n, int ld, Arena* arena) {
  const std::size_t matrix = static_cast<std::size_t>(n) * ld;
  Interior f;
  f.m = arena->take(matrix);
  f.n = arena->take(matrix);
  f.h = arena->take(matrix);
  f.c = arena->take(ld);
  f.q = arena->take(ld);
  f.w = arena->take(ld);
  f.v = arena->take(ld);
  f.y_prev = arena->take(ld);
  f.s_prev = arena->take(ld);
  f.vertex = arena->take(ld);
  f.slope = arena->take(ld);
  f.y = arena->take(ld);
  f.s = arena->take(ld);
  f.free_s = arena->take(ld);
  f.drift = arena->take(ld);
  f.lam = arena->take(ld);
  f.z = arena->take(ld);
  f.u = arena->take(ld);
  f.dz = arena->take(ld);
  f.dlam = arena->take(ld);
  f.rd = arena->take(ld);
  f.rp = arena->take(ld);
  f.e = arena->take(ld);
  f.t = arena->take(ld);
  return f;
}

// s, C and p of the problem. False if the matrix has to be diagnosed.
FASTMTO_INLINE bool prepare(const Problem& problem, int ld, const Exact& e, double* p_scale) {
  const int n = problem.tasks;
  bool good = true;
  for (int i = 0; i < n; ++i) {
    const double d = problem.gram[static_cast<std::ptrdiff_t>(i) * n + i];
    good &= d >= DBL_MIN && d <= DBL_MAX;
    e.s[i] = d;
  }
  if (!good) return false;
  for (int i = n; i < ld; ++i) e.s[i] = 1.0;
  for (int i = 0; i < ld; ++i) e.s[i] = 1.0 / std::sqrt(e.s[i]);
  for (int i = n; i < ld; ++i) e.s[i] = 0.0;
  for (int i = 0; i < n; ++i) {
    const double* g = problem.gram + static_cast<std::ptrdiff_t>(i) * n;
    double* row = e.c + static_cast<std::ptrdiff_t>(i) * ld;
    const double si = e.s[i];
    // One factor at a time: the product of two may overflow.
    for (int j = 0; j < n; ++j) row[j] = g[j] * si * e.s[j];
    for (int j = n; j < ld; ++j) row[j] = 0.0;
  }
  for (int i = 0; i < n; ++i) {
    double* row = e.c + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = 0; j < i; ++j) {
      double* other = e.c + static_cast<std::ptrdiff_t>(j) * ld + i;
      const double x = 0.5 * (row[j] + *other);
      good &= std::fabs(x) <= 1.0 + kCosineSlack && std::fabs(row[j] - *other) <= kAsymmetry;
      row[j] = x;
      *other = x;
    }
    row[i] = 1.0 + problem.ridge;
  }
  if (!good) return false;
  if (problem.preference == nullptr) {
    for (int i = 0; i < n; ++i) e.p[i] = e.p_inv[i] = 1.0;
    *p_scale = 1.0;
  } else {
    double peak = 0.0;
    for (int i = 0; i < n; ++i) peak = max_of(peak, problem.preference[i]);
    double sum_p = 0.0;  // in units of the largest: finite whatever the preferences
    for (int i = 0; i < n; ++i) sum_p += problem.preference[i] / peak;
    for (int i = 0; i < n; ++i) {
      e.p[i] = problem.preference[i] / peak * (n / sum_p);
      e.p_inv[i] = 1.0 / e.p[i];
    }
    *p_scale = peak * (sum_p / n);
  }
  for (int i = n; i < ld; ++i) e.p[i] = e.p_inv[i] = 0.0;
  return true;
}

// Minimiser of t -> f(y (1 + t z)) on t > 0, 1 + t z > 0, for
//   f' = alpha t + beta - sum_i p_i z_i / (1 + t z_i),
// by Newton kept inside a shrinking bracket; f'(0) = -decrement < 0.
FASTMTO_INLINE double line_search(int ld, const double* p, const double* z, double z_min,
                                  double alpha, double beta, double decrement) {
  double low = 0.0;
  double high = z_min < 0.0 ? -1.0 / z_min : DBL_MAX;
  double t = min_of(1.0 / (1.0 + std::sqrt(decrement)), 0.5 * high);
  for (int k = 0; k < kMaxLineSearch; ++k) {
    Pack first = {}, second = {};
    for (int j = 0; j < ld; j += kLanes) {
      const Pack q = pack(z + j) / (1.0 + t * pack(z + j));
      const Pack pq = pack(p + j) * q;
      first += pq;
      second += pq * q;
    }
    const double slope = alpha * t + beta - sum(first);
    if (!(std::fabs(slope) > 0.02 * decrement)) break;
    const double curvature = max_of(alpha, 0.0) + sum(second);
    if (slope < 0.0) {
      low = t;
    } else {
      high = t;
    }
    double next = t - slope / curvature;
    if (!(next > low)) next = 0.5 * (low + t);
    if (!(next < high)) next = high < DBL_MAX ? 0.5 * (t + high) : 2.0 * t;
    t = next;
  }
  return t;
}

// y <- solution of y .* (C y) = p from the y given; e.w = y .* C y on return.
FASTMTO_INLINE Status newton(int n, int ld, double tol, const Exact& e, Info* info) {
  double previous = DBL_MAX;   // residual before the last step
  double last_move = DBL_MAX;  // max |z| of the last factorisation
  for (int k = 0;; ++k) {
    transposed_product(n, ld, e.c, e.y, e.r);
    Pack q_acc = {}, y_acc = {};
    for (int j = 0; j < ld; j += kLanes) {
      const Pack y = pack(e.y + j);
      const Pack w = y * pack(e.r + j);
      pack(e.w + j) = w;
      q_acc += w;
      y_acc += y;
    }
    const double q = sum(q_acc);
    double y_sum = sum(y_acc);
    // q = |sum y_i u_i / |u_i||^2 is known to within eps y_sum^2.
    if (!(q > 0.0)) {
      return q < -64.0 * kEps * y_sum * y_sum ? Status::kNotPsd : Status::kNearStationary;
    }
    const double ray2 = n / q;
    const double ray = std::sqrt(ray2);
    y_sum *= ray;
    // sqrt(T) / y_sum bounds the distance of 0 from the hull of the unit updates from above.
    if (!(8.0 * kEps * y_sum * y_sum <= 1.0)) return Status::kNearStationary;
    Pack res_max = {}, kappa_max = {};
    for (int j = 0; j < ld; j += kLanes) {
      const Pack y = pack(e.y + j) * ray;
      const Pack w = pack(e.w + j) * ray2;
      const Pack r = pack(e.p + j) - w;
      const Pack relative = r * pack(e.p_inv + j);
      const Pack magnitude = relative < 0.0 ? -relative : relative;
      const Pack load = y * pack(e.p_inv + j);
      res_max = magnitude > res_max ? magnitude : res_max;
      kappa_max = load > kappa_max ? load : kappa_max;
      pack(e.y + j) = y;
      pack(e.w + j) = w;
      pack(e.r + j) = r;
      pack(e.z + j) = r;
    }
    const double residual = largest(res_max);
    const double kappa = largest(kappa_max) * y_sum;
    info->iterations = k;
    info->residual = residual;
    info->kappa = kappa;
    if (residual <= max_of(tol, 4.0 * kEps * kappa)) return Status::kSolved;
    if (k == kMaxNewton) return Status::kMaxIterations;

    // While the last factor is nearly right, a step with it costs a fraction of a new one.
    const bool reuse = last_move < 1e-3 && residual < 0.1 * previous;
    previous = residual;
    if (!reuse) {
      for (int i = 0; i < n; ++i) {
        const double yi = e.y[i];
        const double* c = e.c + static_cast<std::ptrdiff_t>(i) * ld;
        double* a = e.a + static_cast<std::ptrdiff_t>(i) * ld;
        for (int j = i / kLanes * kLanes; j < ld; j += kLanes)
          pack(a + j) = yi * pack(c + j) * pack(e.y + j);
        a[i] += e.p[i];
      }
      // The eigenvalues of diag(p)^-1/2 A diag(p)^-1/2 are >= 1 when C is PSD.
      if (!factor<4>(n, ld, e.a, e.d_inv)) return Status::kNotPsd;
    }
    solve(n, ld, e.a, e.d_inv, e.z);
    Pack low = {}, high = {}, decrement_acc = {}, alpha_acc = {}, beta_acc = {};
    for (int j = 0; j < ld; j += kLanes) {
      const Pack z = pack(e.z + j);
      const Pack r = pack(e.r + j);
      low = z < low ? z : low;
      high = z > high ? z : high;
      decrement_acc += z * r;
      alpha_acc += z * (r - pack(e.p + j) * z);
      beta_acc += z * pack(e.w + j);
    }
    const double z_min = -largest(-low);
    const double decrement = sum(decrement_acc);
    double t = 1.0;
    if (!(decrement < 1e-2 && z_min > -0.5)) {
      if (!(decrement > 0.0)) return Status::kNotPsd;
      t = line_search(ld, e.p, e.z, z_min, sum(alpha_acc), sum(beta_acc), decrement);
    }
    if (!reuse) last_move = t == 1.0 ? max_of(largest(high), -z_min) : DBL_MAX;
    for (int j = 0; j < ld; j += kLanes)
      pack(e.y + j) *= 1.0 + t * pack(e.z + j);
  }
}

// y for T <= 2 and equal preferences; e.w is not written.
FASTMTO_INLINE Status closed_form(int n, int ld, const Exact& e, Info* info) {
  const double diagonal = e.c[0];
  const double rho = n == 1 ? 0.0 : e.c[1];
  const double q = n == 1 ? diagonal : diagonal + rho;
  if (q < -64.0 * kEps) return Status::kNotPsd;
  if (!(q >= 8.0 * kEps * n * n)) return Status::kNearStationary;
  const double y = 1.0 / std::sqrt(q);
  for (int j = 0; j < n; ++j) e.y[j] = y;
  for (int j = n; j < ld; ++j) e.y[j] = 0.0;
  info->iterations = 0;
  info->residual = std::fabs(y * y * q - 1.0);
  info->kappa = n * y * y;
  return Status::kSolved;
}

FASTMTO_INLINE Status solve_exact(const Problem& problem, int ld, const double* warm_start,
                                  double tol, const Exact& e, double* p_scale, Info* info) {
  const int n = problem.tasks;
  *info = Info{0, 0.0, 0.0};
  if (!prepare(problem, ld, e, p_scale)) return diagnose(n, problem.gram, false);
  if (n <= 2 && problem.preference == nullptr) return closed_form(n, ld, e, info);
  bool warm = false;
  if (warm_start != nullptr) {
    double peak = 0.0;
    for (int j = 0; j < n; ++j) {
      e.y[j] = warm_start[j] / e.s[j];
      peak = max_of(peak, e.y[j]);
    }
    warm = peak > 0.0 && peak <= DBL_MAX;
    // Only a start: entries that far apart are no better than the bound.
    for (int j = 0; j < n; ++j) e.y[j] = max_of(e.y[j] / peak, 1e-9);
  }
  for (;;) {
    for (int j = warm ? n : 0; j < ld; ++j) e.y[j] = j < n ? 1.0 : 0.0;
    const Status status = newton(n, ld, tol, e, info);
    if (status == Status::kSolved || !warm) return status;
    warm = false;
  }
}

template <int kLd>
FASTMTO_INLINE Status exact_body(const Problem& problem, const double* warm_start, double tol,
                                 double* workspace, double* weights, Info* info) {
  const int n = problem.tasks;
  const int ld = kLd > 0 ? kLd : padded(n);
  Arena arena{workspace};
  const Exact e = carve_exact(n, ld, &arena);
  double p_scale = 1.0;
  const Status status = solve_exact(problem, ld, warm_start, tol, e, &p_scale, info);
  if (status != Status::kSolved) return status;
  const double length = std::sqrt(p_scale);
  for (int i = 0; i < n; ++i) weights[i] = e.y[i] * e.s[i] * length;
  return status;
}

// The relative changes u of y and e of s = M y obey e = diag(1/s) M diag(y) u, whose entries grow
// without bound where some s is much smaller than the y (lengths of the updates decades apart), and
// squared in the normal matrix. So wherever a diagonal entry is large the two change roles: f.n
// maps the free changes (of s where f.free_s, else of y) to the dependent ones, with entries of
// order 1 after scaling by the roots of y s. These are principal pivots of a PSD matrix, the
// largest diagonal entry first.
FASTMTO_INLINE void basis(int n, int ld, const Interior& f) {
  for (int i = 0; i < n; ++i) {
    const double inverse = 1.0 / f.s[i];
    const double* m = f.m + static_cast<std::ptrdiff_t>(i) * ld;
    double* row = f.n + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = 0; j < ld; j += kLanes) pack(row + j) = inverse * pack(m + j) * pack(f.y + j);
  }
  for (int j = 0; j < ld; ++j) f.free_s[j] = 0.0;
  const std::ptrdiff_t next = ld + 1;  // along the diagonal
  for (int count = 0; count < 2 * n; ++count) {
    int k = 0;
    for (int i = 1; i < n; ++i) k = f.n[i * next] > f.n[k * next] ? i : k;
    double* pivot_row = f.n + static_cast<std::ptrdiff_t>(k) * ld;
    const double pivot = pivot_row[k];
    if (!(pivot > kPivot)) break;
    const double inverse = 1.0 / pivot;
    for (int j = 0; j < ld; j += kLanes) pack(pivot_row + j) *= -inverse;
    pivot_row[k] = inverse;
    for (int i = 0; i < n; ++i) {
      if (i == k) continue;
      double* row = f.n + static_cast<std::ptrdiff_t>(i) * ld;
      const double x = row[k];
      row[k] = 0.0;
      for (int j = 0; j < ld; j += kLanes) pack(row + j) += x * pack(pivot_row + j);
    }
    f.free_s[k] = 1.0 - f.free_s[k];
  }
}

// e = N u + drift, the dependent changes.
FASTMTO_INLINE void dependent(int n, int ld, const Interior& f) {
  for (int i = 0; i < n; ++i)
    f.e[i] = dot(ld, f.n + static_cast<std::ptrdiff_t>(i) * ld, f.u) + f.drift[i];
  for (int i = n; i < ld; ++i) f.e[i] = 0.0;
}

// y, s moved by t times the changes in f.u (free) and f.e (dependent).
FASTMTO_INLINE void move_by(int n, double t, const Interior& f) {
  for (int i = 0; i < n; ++i) {
    const bool swapped = f.free_s[i] != 0.0;
    f.y[i] *= 1.0 + t * (swapped ? f.e[i] : f.u[i]);
    f.s[i] *= 1.0 + t * (swapped ? f.u[i] : f.e[i]);
  }
}

// h = diag(lam + D) + D N + N'D + N' (diag(lam) + D) N, D = lam / z; e = lam + D.
FASTMTO_INLINE void normal_matrix(int n, int ld, const Interior& f) {
  for (int j = 0; j < n; ++j) f.e[j] = f.lam[j] + f.lam[j] / f.z[j];
  for (int i = 0; i < n; ++i) {
    double* row = f.h + static_cast<std::ptrdiff_t>(i) * ld;
    const double* own = f.n + static_cast<std::ptrdiff_t>(i) * ld;
    const double d = f.lam[i] / f.z[i];
    for (int j = i / kLanes * kLanes; j < ld; j += kLanes) {
      Pack acc = d * pack(own + j);
      for (int k = 0; k < n; ++k) {
        const double* other = f.n + static_cast<std::ptrdiff_t>(k) * ld;
        acc += f.e[k] * other[i] * pack(other + j);
      }
      pack(row + j) = acc;
    }
    for (int j = i; j < n; ++j)
      row[j] += f.n[static_cast<std::ptrdiff_t>(j) * ld + i] * (f.lam[j] / f.z[j]);
    row[i] += f.e[i];
  }
}

FASTMTO_INLINE double step_to_boundary(int n, const double* x, const double* dx) {
  double t = DBL_MAX;
  for (int i = 0; i < n; ++i) {
    if (dx[i] < 0.0) t = min_of(t, -x[i] / dx[i]);
  }
  return t;
}

// One Newton direction of the interior point: the free changes u, the dependent ones e, dz, dlam
// for the complementarity residual rc (in f.dz on entry: rc / z). rd, rp are those of the current
// point.
FASTMTO_INLINE void direction(int n, int ld, const Interior& f, const double* inverse) {
  for (int i = 0; i < n; ++i) f.dlam[i] = -f.dz[i] - f.lam[i] / f.z[i] * f.rp[i];
  for (int i = n; i < ld; ++i) f.dlam[i] = 0.0;
  transposed_product(n, ld, f.n, f.dlam, f.u);
  for (int j = 0; j < ld; j += kLanes) pack(f.u + j) += pack(f.dlam + j) - pack(f.rd + j);
  solve(n, ld, f.h, inverse, f.u);
  dependent(n, ld, f);
  for (int i = 0; i < n; ++i) {
    const double dz = f.u[i] + (f.e[i] - f.drift[i]) + f.rp[i];
    f.dlam[i] = -f.dz[i] - f.lam[i] / f.z[i] * dz;
    f.dz[i] = dz;
  }
}

// Residuals at f.y, f.s, f.lam, with N: rp_i = log(y_i s_i / p_i) and the drift,
// rd = g + N'g', g and g' the free and the dependent entries of (q .* y - lam, w .* s - lam).
// Returns the largest |rd|.
FASTMTO_INLINE double residuals(int n, int ld, const Exact& ex, const Interior& f) {
  basis(n, ld, f);
  transposed_product(n, ld, f.m, f.y, f.t);
  for (int i = 0; i < n; ++i) {
    const double rho = (f.s[i] - f.t[i]) / f.s[i];
    f.u[i] = f.free_s[i] != 0.0 ? rho : 0.0;
    f.drift[i] = f.free_s[i] != 0.0 ? 0.0 : -rho;
  }
  for (int i = n; i < ld; ++i) f.u[i] = f.t[i] = 0.0;
  dependent(n, ld, f);
  for (int i = 0; i < n; ++i) {
    f.drift[i] = f.e[i];
    f.rp[i] = std::log(f.y[i] * f.s[i] / ex.p[i]) + f.drift[i];
    const double of_y = f.q[i] * f.y[i] - f.lam[i];
    const double of_s = f.w[i] * f.s[i] - f.lam[i];
    f.u[i] = f.free_s[i] != 0.0 ? of_s : of_y;
    f.t[i] = f.free_s[i] != 0.0 ? of_y : of_s;
  }
  transposed_product(n, ld, f.n, f.t, f.rd);
  double dual = 0.0;
  for (int i = 0; i < n; ++i) {
    f.rd[i] += f.u[i];
    dual = max_of(dual, std::fabs(f.rd[i]));
  }
  return dual;
}

// The objective, without the cancellation of c'y.
FASTMTO_INLINE double objective(int ld, const Interior& f) {
  return dot(ld, f.q, f.y) + dot(ld, f.w, f.s);
}

// Newton on the optimality conditions with the constraints that the interior point found active as
// equations, each softened by a small multiple of its multiplier's change (which vanishes at the
// solution and keeps the matrix definite). Leaves f.y as it is where that does not succeed.
FASTMTO_INLINE void polish(int n, int ld, const Exact& ex, const Interior& f) {
  const double value = objective(ld, f);
  for (int i = 0; i < n; ++i) {
    f.slope[i] = f.y[i];
    f.s_prev[i] = f.s[i];
    const bool active = f.lam[i] > f.z[i] * kActive * value;
    if (!active) f.lam[i] = 0.0;
    f.z[i] = kSoftness;
  }
  double move = DBL_MAX;
  bool good = true;
  for (int k = 0; k < kMaxPolish && good && !(move < 1e-13); ++k) {
    residuals(n, ld, ex, f);
    normal_matrix(n, ld, f);
    good = factor<4>(n, ld, f.h, ex.d_inv);
    if (!good) break;
    for (int i = 0; i < n; ++i) f.dz[i] = 0.0;
    direction(n, ld, f, ex.d_inv);
    const double before = move;
    move = 0.0;
    for (int i = 0; i < n; ++i)
      move = max_of(move, max_of(std::fabs(f.u[i]), std::fabs(f.e[i])));
    if (move > 0.5 * before) break;  // rounding
    good = move < 1e-2;
    move_by(n, 1.0, f);
    for (int i = 0; i < n; ++i) f.lam[i] += f.dlam[i];
  }
  good &= move < 1e-9;
  if (good) {
    residuals(n, ld, ex, f);
    for (int i = 0; i < n; ++i) good &= f.lam[i] >= 0.0 && f.rp[i] >= -1e-12;
  }
  if (!good) {
    for (int i = 0; i < n; ++i) {
      f.y[i] = f.slope[i];
      f.s[i] = f.s_prev[i];
    }
  }
}

// argmin c'y s.t. y_i s_i >= p_i, s = M y, by following the central path of
//   tau c'y - sum_i log(y_i s_i - p_i),
// which is self-concordant: damped Newton steps converge from anywhere. Slower than primal_dual(),
// for the rare problems on which that one stalls. f.y, f.lam, f.z as there.
FASTMTO_INLINE Status barrier(int n, int ld, const Exact& ex, const Interior& f,
                              std::int32_t* iterations) {
  for (int j = 0; j < n; ++j) {
    f.y[j] = 1.5;
    f.s[j] = 1.5 * ex.p[j];
  }
  for (int j = n; j < ld; ++j) f.y[j] = f.s[j] = f.lam[j] = f.z[j] = f.rd[j] = 0.0;
  double tau = 0.0;
  double centred = 0.0;  // tau of the last point on the path, kept in f.slope
  for (int k = 0; k < kMaxBarrier; ++k) {
    ++*iterations;
    const double value = objective(ld, f);
    if (!(value > 0.0)) return Status::kUnbounded;
    if (!(value <= DBL_MAX)) return Status::kMaxIterations;
    if (k == 0) tau = 2.0 * n / value;
    bool inside = true;
    for (int i = 0; i < n; ++i) {
      const double excess = f.y[i] * f.s[i] / ex.p[i] - 1.0;
      inside &= excess > 0.0 && f.y[i] > 0.0;
      // In these terms the barrier's Hessian is tau times the normal matrix, its gradient tau rd.
      f.z[i] = excess;
      f.lam[i] = (1.0 + 1.0 / excess) / tau;
    }
    double decrement = DBL_MAX;
    if (inside) {
      residuals(n, ld, ex, f);
      normal_matrix(n, ld, f);
      inside = factor<4>(n, ld, f.h, ex.d_inv);
    }
    if (inside) {
      for (int j = 0; j < ld; j += kLanes) pack(f.u + j) = -pack(f.rd + j);
      solve(n, ld, f.h, ex.d_inv, f.u);
      decrement = std::sqrt(max_of(-tau * dot(ld, f.rd, f.u), 0.0));
      dependent(n, ld, f);
    }
    if (decrement < 0.25) {
      centred = tau;
      for (int i = 0; i < n; ++i) {
        f.slope[i] = f.y[i];
        f.s_prev[i] = f.s[i];
      }
    }
    const double gap = 2.0 * n / value;  // times 1 / tau
    // Off the path only by rounding, which ends it; the last point on it may be good enough.
    if (!inside || (decrement < 0.25 && gap <= kBarrierGap * tau)) {
      if (!(gap <= kRoundedGap * centred)) return Status::kMaxIterations;
      for (int i = 0; i < n; ++i) {
        f.y[i] = f.slope[i];
        f.s[i] = f.s_prev[i];
        const double excess = f.y[i] * f.s[i] / ex.p[i] - 1.0;
        f.z[i] = std::log1p(excess);
        f.lam[i] = (1.0 + 1.0 / excess) / centred;
      }
      return Status::kSolved;
    }
    const double t = decrement < 0.25 ? 1.0 : 1.0 / (1.0 + decrement);
    move_by(n, t, f);
    if (decrement < 0.25) tau = min_of(10.0 * tau, 1.01 * gap / kBarrierGap);
  }
  return Status::kMaxIterations;
}

// argmin c'y s.t. y_i (M y)_i >= p_i, y > 0, M 1 = p, by a primal-dual interior point with slack
// z = log y + log(M y) - log p and multipliers lam. f.y holds the answer.
FASTMTO_INLINE Status primal_dual(int n, int ld, const Exact& ex, const Interior& f,
                                     std::int32_t* iterations) {
  double start = 0.0;  // sum lam = (q'y + w's) / 2 at the solution
  for (int j = 0; j < n; ++j) start += 0.75 * (f.q[j] + f.w[j] * ex.p[j]) / n;
  for (int j = 0; j < n; ++j) {
    f.y[j] = 1.5;
    f.s[j] = 1.5 * ex.p[j];
    f.z[j] = 2.0 * std::log(1.5);
    f.lam[j] = start;
  }
  for (int j = n; j < ld; ++j)
    f.y[j] = f.s[j] = f.lam[j] = f.z[j] = f.rd[j] = f.rp[j] = 0.0;
  // y > 0 and M y > 0 throughout, so that a large enough multiple of y is always feasible.
  for (int k = 0; k <= kMaxInterior; ++k) {
    *iterations = k;
    const double value = objective(ld, f);
    if (!(value > 0.0)) return Status::kUnbounded;
    if (!(value <= DBL_MAX)) return Status::kMaxIterations;
    const double dual = residuals(n, ld, ex, f);
    double primal = 0.0, carried = 0.0, gap = 0.0;
    for (int i = 0; i < n; ++i) {
      // The logarithm bends: a long step leaves another slack than the linearised constraint
      // foresaw. Where it is a slack it is taken as it is; carried as a residual it keeps the gap
      // from closing.
      if (f.rp[i] > 0.1 * f.z[i]) f.z[i] = f.rp[i];
      f.rp[i] -= f.z[i];
      primal = max_of(primal, std::fabs(f.rp[i]));
      carried += f.lam[i] * std::fabs(f.rp[i]);
      gap += f.lam[i] * f.z[i];
    }
    if (dual <= kFeasible * value && primal <= kFeasible && gap <= kGap * value)
      return Status::kSolved;
    normal_matrix(n, ld, f);
    if (!factor<4>(n, ld, f.h, ex.d_inv)) return Status::kMaxIterations;
    // Predictor: straight to complementarity 0.
    for (int i = 0; i < n; ++i) f.dz[i] = f.lam[i];
    direction(n, ld, f, ex.d_inv);
    const double tp = min_of(1.0, step_to_boundary(n, f.z, f.dz));
    const double td = min_of(1.0, step_to_boundary(n, f.lam, f.dlam));
    double reached = 0.0;
    for (int i = 0; i < n; ++i)
      reached += (f.z[i] + tp * f.dz[i]) * (f.lam[i] + td * f.dlam[i]);
    const double ratio = reached / gap;
    // Not below what the residuals are worth: complementarity that runs ahead of them only makes
    // the matrix singular.
    const double floor = max_of(0.1 * kGap * value, 0.01 * max_of(dual, carried));
    const double mu = max_of(ratio * ratio * ratio * gap, floor) / n;
    // Corrector.
    for (int i = 0; i < n; ++i) f.dz[i] = f.lam[i] + (f.dlam[i] * f.dz[i] - mu) / f.z[i];
    direction(n, ld, f, ex.d_inv);
    double t = min_of(step_to_boundary(n, f.z, f.dz), step_to_boundary(n, f.lam, f.dlam));
    for (int i = 0; i < n; ++i) {
      if (f.u[i] < 0.0) t = min_of(t, -1.0 / f.u[i]);
      if (f.e[i] < 0.0) t = min_of(t, -1.0 / f.e[i]);  // M y > 0
    }
    t = min_of(1.0, 0.99 * t);
    move_by(n, t, f);
    for (int i = 0; i < n; ++i) {
      f.z[i] += t * f.dz[i];
      f.lam[i] += t * f.dlam[i];
    }
  }
  return Status::kMaxIterations;
}

// One subproblem in coordinates y = a / a*, linearised at f.y_prev; f.y the answer.
FASTMTO_INLINE Status outer_step(int n, int ld, double p_scale, const Exact& ex, const Interior& f,
                                 std::int32_t* iterations) {
  *iterations = 0;
  // q = 1/y_prev, w = p_scale v + 1 / (M y_prev); c = q + M w scaled to a largest entry of 1.
  for (int i = 0; i < n; ++i) {
    f.q[i] = 1.0 / f.y_prev[i];
    f.w[i] = p_scale * f.v[i] + 1.0 / f.s_prev[i];
  }
  for (int i = n; i < ld; ++i) f.q[i] = f.w[i] = 0.0;
  transposed_product(n, ld, f.m, f.w, f.c);
  double peak = 0.0;
  bool finite = true;
  for (int i = 0; i < n; ++i) {
    f.c[i] += f.q[i];
    finite &= std::fabs(f.c[i]) <= DBL_MAX;
    peak = max_of(peak, std::fabs(f.c[i]));
  }
  // Some (G a)_i = 0: the linearisation does not exist. All of c = 0: everything is a minimum.
  if (!finite || !(peak > 0.0)) return Status::kUnbounded;
  for (int i = 0; i < n; ++i) {
    f.slope[i] = f.c[i] /= peak;
    f.q[i] /= peak;
    f.w[i] /= peak;
  }
  for (int i = n; i < ld; ++i) f.slope[i] = f.c[i] = 0.0;
  // Multipliers at y = 1: all constraints active, c = (diag(p) + M) slope.
  solve(n, ld, ex.a, f.vertex, f.slope);
  double smallest = DBL_MAX;
  for (int i = 0; i < n; ++i) smallest = min_of(smallest, f.slope[i]);
  if (smallest >= 0.0) {
    for (int i = 0; i < n; ++i) {
      f.y[i] = 1.0;
      f.s[i] = ex.p[i];
    }
    for (int i = n; i < ld; ++i) f.y[i] = f.s[i] = 0.0;
    return Status::kSolved;
  }
  Status status = primal_dual(n, ld, ex, f, iterations);
  if (status == Status::kMaxIterations) status = barrier(n, ld, ex, f, iterations);
  if (status == Status::kSolved) polish(n, ld, ex, f);
  return status;
}

// The exact solution, M there and the factor for the vertex test; v = 1/a*.
FASTMTO_INLINE Status whiten(const Problem& problem, int ld, const Exact& ex, const Interior& f,
                             double* p_scale, Info* info) {
  const int n = problem.tasks;
  const Status status = solve_exact(problem, ld, nullptr, 1e-13, ex, p_scale, info);
  if (status != Status::kSolved) return status;
  for (int i = 0; i < n; ++i) {
    const double* c = ex.c + static_cast<std::ptrdiff_t>(i) * ld;
    double* m = f.m + static_cast<std::ptrdiff_t>(i) * ld;
    double* a = ex.a + static_cast<std::ptrdiff_t>(i) * ld;
    for (int j = 0; j < ld; j += kLanes)
      pack(a + j) = pack(m + j) = ex.y[i] * pack(c + j) * pack(ex.y + j);
    a[i] += ex.p[i];
  }
  if (!factor<4>(n, ld, ex.a, f.vertex)) return Status::kNotPsd;
  const double length = std::sqrt(*p_scale);
  for (int i = 0; i < n; ++i) f.v[i] = 1.0 / (ex.y[i] * ex.s[i] * length);
  for (int i = n; i < ld; ++i) f.v[i] = f.y_prev[i] = f.s_prev[i] = 0.0;
  return status;
}

FASTMTO_INLINE Status ccp_body(const Problem& problem, const double* start, int max_steps,
                               double tol, double* workspace, double* weights, Info* info) {
  // No steps to loop over: one, with the interior point's steps counted.
  const bool single = max_steps == 0;
  const int n = problem.tasks;
  const int ld = padded(n);
  Arena arena{workspace};
  const Exact ex = carve_exact(n, ld, &arena);
  const Interior f = carve_interior(n, ld, &arena);
  double p_scale = 1.0;
  Status status = whiten(problem, ld, ex, f, &p_scale, info);
  info->iterations = 0;
  info->residual = 0.0;
  if (status != Status::kSolved) return status;
  for (int i = 0; i < n; ++i) f.y_prev[i] = start == nullptr ? f.v[i] : start[i] * f.v[i];
  transposed_product(n, ld, f.m, f.y_prev, f.s_prev);
  for (int k = 1; k <= (single ? 1 : max_steps); ++k) {
    std::int32_t inner;
    status = outer_step(n, ld, p_scale, ex, f, &inner);
    info->iterations = single ? inner : k;
    if (status != Status::kSolved) return status;
    double change = 0.0;
    for (int i = 0; i < n; ++i) {
      change = max_of(change, std::fabs(f.y[i] / f.y_prev[i] - 1.0));
      f.y_prev[i] = f.y[i];
      f.s_prev[i] = f.s[i];
    }
    info->residual = change;
    if (change <= max_of(tol, kStepTolerance)) break;
  }
  for (int i = 0; i < n; ++i) weights[i] = f.y[i] / f.v[i];
  return Status::kSolved;
}

// Rows of one pack have a copy of their own.
FASTMTO_INLINE Status exact(const Problem& problem, const double* warm_start, double tol,
                            double* workspace, double* weights, Info* info) {
  if (problem.tasks <= kLanes)
    return exact_body<kLanes>(problem, warm_start, tol, workspace, weights, info);
  return exact_body<0>(problem, warm_start, tol, workspace, weights, info);
}

FASTMTO_DISPATCH(exact,
                 (const Problem& problem, const double* warm_start, double tol, double* workspace,
                  double* weights, Info* info),
                 (problem, warm_start, tol, workspace, weights, info))
FASTMTO_DISPATCH(ccp_body,
                 (const Problem& problem, const double* start, int max_steps, double tol,
                  double* workspace, double* weights, Info* info),
                 (problem, start, max_steps, tol, workspace, weights, info))

}  // namespace

Status bargaining_exact(const Problem& problem, const double* warm_start, double tol,
                        double* workspace, double* weights, Info* info) {
  return exact_chosen(problem, warm_start, tol, workspace, weights, info);
}

Status bargaining_ccp(const Problem& problem, const double* warm_start, int max_steps, double tol,
                      double* workspace, double* weights, Info* info) {
  return ccp_body_chosen(problem, warm_start, max_steps, tol, workspace, weights, info);
}

Status ccp_step(const Problem& problem, const double* previous, double* workspace, double* weights,
                Info* info) {
  return ccp_body_chosen(problem, previous, 0, 0.0, workspace, weights, info);
}

}  // namespace fastmto::solvers
