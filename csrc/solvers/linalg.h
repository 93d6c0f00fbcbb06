// Dense linear algebra for matrices of a few to a few hundred rows.
//
// Everything is written on packs of 8 doubles, whatever the instruction set: the compiler splits a
// pack into the registers it has. Sums are therefore taken in one fixed order and, without
// contraction (-ffp-contract=off), every instruction set gives the same bits.
//
// Conventions
//   ld        leading dimension: rows padded to a multiple of 8; see padded()
//   matrices  row-major (n, ld), 64-byte aligned, columns n..ld-1 zero
//   vectors   (ld), 64-byte aligned, entries n..ld-1 zero unless said otherwise
//
// All functions must inline into a caller that carries a target attribute.
#pragma once

#include <cstddef>

#define FASTMTO_INLINE inline __attribute__((always_inline))

namespace fastmto::solvers {

constexpr int kLanes = 8;
typedef double Pack __attribute__((vector_size(64), may_alias));
typedef double HalfPack __attribute__((vector_size(32)));

constexpr int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

FASTMTO_INLINE Pack& pack(double* p) { return *reinterpret_cast<Pack*>(p); }
FASTMTO_INLINE const Pack& pack(const double* p) { return *reinterpret_cast<const Pack*>(p); }

FASTMTO_INLINE double sum(const Pack& v) {
  HalfPack low, high;
  for (int i = 0; i < 4; ++i) {
    low[i] = v[i];
    high[i] = v[i + 4];
  }
  const HalfPack s = low + high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}

FASTMTO_INLINE double largest(const Pack& v) {
  double m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

FASTMTO_INLINE double dot(int ld, const double* a, const double* b) {
  Pack acc = pack(a) * pack(b);
  for (int j = kLanes; j < ld; j += kLanes) acc += pack(a + j) * pack(b + j);
  return sum(acc);
}

FASTMTO_INLINE double total(int ld, const double* a) {
  Pack acc = pack(a);
  for (int j = kLanes; j < ld; j += kLanes) acc += pack(a + j);
  return sum(acc);
}

template <int kPacks>
FASTMTO_INLINE void transposed_columns(int n, int ld, const double* a, const double* x,
                                       double* out) {
  Pack acc[kPacks];
  for (int b = 0; b < kPacks; ++b) acc[b] = x[0] * pack(a + b * kLanes);
  for (int i = 1; i < n; ++i) {
    const double* row = a + static_cast<std::ptrdiff_t>(i) * ld;
    for (int b = 0; b < kPacks; ++b) acc[b] += x[i] * pack(row + b * kLanes);
  }
  for (int b = 0; b < kPacks; ++b) pack(out + b * kLanes) = acc[b];
}

// out = A' x for A (n, ld); out must not overlap x. For a symmetric A this is A x.
FASTMTO_INLINE void transposed_product(int n, int ld, const double* a, const double* x,
                                       double* out) {
  int j = 0;
  for (; j + 4 * kLanes <= ld; j += 4 * kLanes) transposed_columns<4>(n, ld, a + j, x, out + j);
  for (; j < ld; j += kLanes) transposed_columns<1>(n, ld, a + j, x, out + j);
}

// LDL' of a symmetric positive definite matrix without pivoting, in place.
//
//   a        (n, ld) upper triangle read; on success row k holds d_k L[j][k] in columns j > k and
//            0 in columns <= k of its own pack and the packs after it; other entries are undefined
//   inverse  (ld) out: 1 / d_k; entries from n on are not written
// Returns false at the first pivot that is not positive (NaN included).
// Only columns below `width` are touched (a multiple of 8, at least n); ld where it is left out.
template <int kBlock>
FASTMTO_INLINE bool factor(int n, int width, int ld, double* a, double* inverse) {
  int k = 0;
  while (k < n) {
    const int block = n - k < kBlock ? n - k : kBlock;
    double* rows = a + static_cast<std::ptrdiff_t>(k) * ld;
    const int first = k / kLanes * kLanes;
    // The block's own rows, each reduced by those before it.
    for (int b = 0; b < block; ++b) {
      double* row = rows + static_cast<std::ptrdiff_t>(b) * ld;
      for (int e = 0; e < b; ++e) {
        const double* pivot = rows + static_cast<std::ptrdiff_t>(e) * ld;
        const double f = pivot[k + b] * inverse[k + e];
        for (int j = first; j < width; j += kLanes) pack(row + j) -= f * pack(pivot + j);
      }
      const double d = row[k + b];
      if (!(d > 0.0)) return false;
      inverse[k + b] = 1.0 / d;
    }
    // The rows below, by the whole block at once: each is read and written once a block.
    if (block == kBlock) {
      for (int i = k + kBlock; i < n; ++i) {
        double* row = a + static_cast<std::ptrdiff_t>(i) * ld;
        double f[kBlock];
        for (int b = 0; b < kBlock; ++b)
          f[b] = rows[static_cast<std::ptrdiff_t>(b) * ld + i] * inverse[k + b];
        for (int j = i / kLanes * kLanes; j < width; j += kLanes) {
          Pack v = pack(row + j);
          for (int b = 0; b < kBlock; ++b)
            v -= f[b] * pack(rows + static_cast<std::ptrdiff_t>(b) * ld + j);
          pack(row + j) = v;
        }
      }
    }
    for (int b = 0; b < block; ++b) {
      double* row = rows + static_cast<std::ptrdiff_t>(b) * ld;
      const int last = k + b;
      for (int j = last / kLanes * kLanes; j <= last; ++j) row[j] = 0.0;
    }
    k += block;
  }
  return true;
}

template <int kBlock>
FASTMTO_INLINE bool factor(int n, int ld, double* a, double* inverse) {
  return factor<kBlock>(n, ld, ld, a, inverse);
}

// x <- D^-1 L^-1 x with the factor of A from factor(), of which only the first n rows and the first
// `width` columns count (width a multiple of 8, the columns from n on zero); x (width), zero from n
// on. Works through x in packs that stay in registers: a scalar written into a pack that is read
// again at once would stall on the store.
FASTMTO_INLINE void forward(int n, int width, int ld, const double* a, const double* inverse,
                            double* x) {
  for (int first = 0; first < n; first += kLanes) {
    const int rows = n - first < kLanes ? n - first : kLanes;
    const double* block = a + static_cast<std::ptrdiff_t>(first) * ld;
    double f[kLanes];
    Pack v = pack(x + first);
    for (int k = 0; k < rows; ++k) {
      f[k] = v[k] * inverse[first + k];
      v -= f[k] * pack(block + static_cast<std::ptrdiff_t>(k) * ld + first);
    }
    for (int k = rows; k < kLanes; ++k) f[k] = 0.0;
    for (int j = first + kLanes; j < width; j += kLanes) {
      Pack w = pack(x + j);
      for (int k = 0; k < rows; ++k)
        w -= f[k] * pack(block + static_cast<std::ptrdiff_t>(k) * ld + j);
      pack(x + j) = w;
    }
    for (int k = 0; k < kLanes; ++k) v[k] = f[k];
    pack(x + first) = v;
  }
}

// x <- L'^-1 x; as forward().
FASTMTO_INLINE void backward(int n, int width, int ld, const double* a, const double* inverse,
                             double* x) {
  for (int first = (n - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
    const int rows = n - first < kLanes ? n - first : kLanes;
    const double* block = a + static_cast<std::ptrdiff_t>(first) * ld;
    Pack v = pack(x + first);
    if (first + kLanes < width) {
      for (int k = 0; k < rows; ++k) {
        const double* row = block + static_cast<std::ptrdiff_t>(k) * ld;
        v[k] -= inverse[first + k] *
                dot(width - first - kLanes, row + first + kLanes, x + first + kLanes);
      }
    }
    for (int k = rows - 2; k >= 0; --k) {
      const Pack t = pack(block + static_cast<std::ptrdiff_t>(k) * ld + first) * v;
      v[k] -= inverse[first + k] * sum(t);
    }
    pack(x + first) = v;
  }
}

// x <- A^-1 x with the factor of A from factor(); x (ld), zero from n on.
FASTMTO_INLINE void solve(int n, int ld, const double* a, const double* inverse, double* x) {
  forward(n, ld, ld, a, inverse, x);
  backward(n, ld, ld, a, inverse, x);
}

}  // namespace fastmto::solvers
