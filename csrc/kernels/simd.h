// Vectors of 64 bytes for the instruction set of the including file, which defines
// FASTMTO_VECTOR_BYTES (the native width) and FASTMTO_LEVEL (0 baseline, 3, 4). Part of
// loops.h; everything lives in the including file's own namespace.

#define FASTMTO_INLINE inline __attribute__((always_inline))

template <class S>
struct Pack {
  typedef S Part __attribute__((vector_size(FASTMTO_VECTOR_BYTES)));
  static constexpr int lanes = 64 / sizeof(S);
  static constexpr int parts = 64 / FASTMTO_VECTOR_BYTES;
  Part part[parts];
};

template <class S>
FASTMTO_INLINE Pack<S> broadcast(S x) {
  Pack<S> r;
  for (auto& part : r.part) part = x - typename Pack<S>::Part{};
  return r;
}

#define FASTMTO_OPERATOR(op)                                                       \
  template <class S>                                                               \
  FASTMTO_INLINE Pack<S> operator op(Pack<S> a, Pack<S> b) {                       \
    for (int i = 0; i < Pack<S>::parts; ++i) a.part[i] = a.part[i] op b.part[i];   \
    return a;                                                                      \
  }
FASTMTO_OPERATOR(+)
FASTMTO_OPERATOR(-)
FASTMTO_OPERATOR(*)
FASTMTO_OPERATOR(/)
#undef FASTMTO_OPERATOR

// A NaN in b comes through.
template <class S>
FASTMTO_INLINE Pack<S> max(Pack<S> a, Pack<S> b) {
  for (int i = 0; i < Pack<S>::parts; ++i) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}

template <class S>
FASTMTO_INLINE Pack<S> abs(Pack<S> a) {
  return max(broadcast(S(0)) - a, a);
}

// sqrt of a native vector; no errno, so it is one instruction.
template <class Part>
FASTMTO_INLINE Part root_part(Part a) {
  constexpr bool single = sizeof(a[0]) == 4;
#if FASTMTO_LEVEL == 4
  if constexpr (single) return (Part)_mm512_sqrt_ps((__m512)a);
  else return (Part)_mm512_sqrt_pd((__m512d)a);
#elif FASTMTO_LEVEL == 3
  if constexpr (single) return (Part)_mm256_sqrt_ps((__m256)a);
  else return (Part)_mm256_sqrt_pd((__m256d)a);
#elif defined(__SSE2__)
  if constexpr (single) return (Part)_mm_sqrt_ps((__m128)a);
  else return (Part)_mm_sqrt_pd((__m128d)a);
#else
  for (int lane = 0; lane < int(sizeof a / sizeof a[0]); ++lane) a[lane] = std::sqrt(a[lane]);
  (void)single;
  return a;
#endif
}

template <class S>
FASTMTO_INLINE Pack<S> root(Pack<S> a) {
  for (auto& part : a.part) part = root_part(part);
  return a;
}

// a b + c: one rounding with float maths on v4, else two.
template <class S>
FASTMTO_INLINE Pack<S> mul_add(Pack<S> a, Pack<S> b, Pack<S> c) {
#if FASTMTO_LEVEL == 4
  if constexpr (sizeof(S) == 4) {
    Pack<S> r;
    r.part[0] = (typename Pack<S>::Part)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0],
                                                        (__m512)c.part[0]);
    return r;
  }
#endif
  return a * b + c;
}

// over_root(2 n, v, 2 eps) = n / (sqrt(v) + eps) for v = kept_from_zero(x) of some x >= 0, eps > 0.
// With both doubled the Newton step on the root needs no factor 1/2.
//
// Float maths on v4: y = 1/sqrt(v) to 14 bits, h = v y, then h (3 - h y) = 2 sqrt(v) to 26 bits (one
// Newton step), and the quotient by a 14-bit 1/d, corrected once by its remainder. That needs v to
// be a normal number: 1e-38 is added to it, which eps > 2e-12 hides (tasks.h sees to that).
//
// An infinite v, the square of a number too large for S, gives NaN here, which the Gram's diagonal
// shows: 0, its limit, would pass, and leave moments infinite for good.
template <class S>
FASTMTO_INLINE Pack<S> kept_from_zero(Pack<S> v) {
#if FASTMTO_LEVEL == 4
  if constexpr (sizeof(S) == 4) return v + broadcast(1.17549435e-38f);
#endif
  return v;
}

template <class S>
FASTMTO_INLINE Pack<S> over_root(Pack<S> twice_n, Pack<S> v, Pack<S> twice_eps) {
#if FASTMTO_LEVEL == 4
  if constexpr (sizeof(S) == 4) {
    const __m512 n = (__m512)twice_n.part[0];
    const __m512 x = (__m512)v.part[0];
    const __m512 y = _mm512_rsqrt14_ps(x);
    const __m512 h = _mm512_mul_ps(x, y);
    const __m512 k = _mm512_fnmadd_ps(h, y, _mm512_set1_ps(3.0f));
    const __m512 d = _mm512_fmadd_ps(h, k, (__m512)twice_eps.part[0]);
    const __m512 r = _mm512_rcp14_ps(d);
    const __m512 q = _mm512_mul_ps(n, r);
    const __m512 rest = _mm512_fnmadd_ps(q, d, n);
    Pack<S> u;
    u.part[0] = (typename Pack<S>::Part)_mm512_fmadd_ps(rest, r, q);
    return u;
  }
#endif
  const Pack<S> s = root(v);
  return twice_n / (s + s + (s - s) + twice_eps);
}

// Element types of tensors in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class D>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class D>
using Compute = typename ComputeOf<D>::type;

typedef std::uint32_t Bits __attribute__((vector_size(FASTMTO_VECTOR_BYTES)));
typedef std::uint16_t Halves __attribute__((vector_size(FASTMTO_VECTOR_BYTES / 2)));
typedef Pack<float>::Part Floats;

FASTMTO_INLINE Floats widen(Halves halves, BFloat16) {
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

// Round to nearest even; a NaN stays a (quiet) NaN.
FASTMTO_INLINE Halves narrow(Floats x, BFloat16) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((Bits)(x != x) ? nan : rounded, Halves);
}

#if FASTMTO_LEVEL == 4
FASTMTO_INLINE Floats widen(Halves halves, Float16) {
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
}
FASTMTO_INLINE Halves narrow(Floats x, Float16) {
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTMTO_LEVEL == 3
FASTMTO_INLINE Floats widen(Halves halves, Float16) {
  return (Floats)_mm256_cvtph_ps((__m128i)halves);
}
FASTMTO_INLINE Halves narrow(Floats x, Float16) {
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Exponents are moved from bias 15 to 127 by a product with 2^112, which is exact for subnormal
// halves too; the largest exponent means inf or NaN on both sides.
FASTMTO_INLINE Floats widen(Halves halves, Float16) {
  const Bits h = __builtin_convertvector(halves, Bits);
  const Bits sign = (h & 0x8000) << 16;
  const Bits shifted = (h & 0x7fff) << 13;
  const Bits finite = (Bits)((Floats)shifted * 0x1p112f);
  const Bits special = shifted | 0x7f800000;
  return (Floats)(((Bits)((h & 0x7c00) == 0x7c00) ? special : finite) | sign);
}
// Round to nearest even: in the integers for normal halves, by adding 0.5 (whose last place is the
// spacing of subnormal halves) for subnormal ones.
FASTMTO_INLINE Halves narrow(Floats x, Float16) {
  const Bits bits = (Bits)x;
  const Bits sign = (bits >> 16) & 0x8000;
  const Bits size = bits & 0x7fffffff;
  const Bits normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  const Bits subnormal = (Bits)((Floats)size + 0.5f) - 0x3f000000;
  const Bits infinite = (Bits)(size > 0x7f800000) & 0x200;
  const Bits finite = (Bits)(size < 0x38800000) ? subnormal : normal;
  return __builtin_convertvector(
      ((Bits)(size >= 0x477ff000) ? (infinite | 0x7c00) : finite) | sign, Halves);
}
#endif

// One native vector at a time: gcc 12 copies a whole Pack through the stack.
template <class D>
FASTMTO_INLINE Pack<Compute<D>> load(const D* from) {
  using V = Pack<Compute<D>>;
  V r;
  for (int i = 0; i < V::parts; ++i) {
    const D* source = from + i * (V::lanes / V::parts);
    if constexpr (sizeof(D) == 2) {
      Halves halves;
      std::memcpy(&halves, source, sizeof halves);
      r.part[i] = widen(halves, D{});
    } else {
      std::memcpy(&r.part[i], source, sizeof r.part[i]);
    }
  }
  return r;
}

template <class D>
FASTMTO_INLINE void store(D* to, Pack<Compute<D>> x) {
  using V = Pack<Compute<D>>;
  for (int i = 0; i < V::parts; ++i) {
    D* target = to + i * (V::lanes / V::parts);
    if constexpr (sizeof(D) == 2) {
      const Halves halves = narrow(x.part[i], D{});
      std::memcpy(target, &halves, sizeof halves);
    } else {
      std::memcpy(target, &x.part[i], sizeof x.part[i]);
    }
  }
}

// The first n < lanes elements; the others are 0.
template <class D>
FASTMTO_INLINE Pack<Compute<D>> load_some(const D* from, int n) {
  D whole[Pack<Compute<D>>::lanes] = {};
  std::memcpy(whole, from, n * sizeof(D));
  return load(whole);
}

template <class D>
FASTMTO_INLINE void store_some(D* to, Pack<Compute<D>> x, int n) {
  D whole[Pack<Compute<D>>::lanes];
  store(whole, x);
  std::memcpy(to, whole, n * sizeof(D));
}
