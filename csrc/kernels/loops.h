// The loops of blocks.h, for the instruction set of the including isa_*.cpp, which has defined
// FASTMTO_ISA (a namespace and table name), FASTMTO_LEVEL and FASTMTO_VECTOR_BYTES and included
// every standard header. No include guard: one inclusion, one instruction set.

namespace fastmto {
namespace FASTMTO_ISA {

#include "simd.h"

#include "rules.h"

#include "draws.h"

template <class D>
FASTMTO_INLINE const D* row(const Rows& rows, int task, std::int64_t at) {
  return static_cast<const D*>(rows.grads[task]) + at;
}

template <class S>
FASTMTO_INLINE S* moment(const Rows& rows, int k, int owner, std::int64_t at) {
  return static_cast<S*>(rows.state[k * rows.owners + owner]) + at;
}

// Asks for what a loop over rows will read soon: the hardware's own prefetch stops at every page, of
// which T + 3 rows open many. 1 KiB is far enough, and keeps all rows within the first-level cache.
FASTMTO_INLINE void fetch_ahead(const void* now) {
  __builtin_prefetch(static_cast<const char*>(now) + 1024);
}

// `n` elements from `from`; whole vectors compile to one plain load.
template <bool whole, class D>
FASTMTO_INLINE Pack<Compute<D>> take(const D* from, int n) {
  if constexpr (whole) return load(from);
  return load_some(from, n);
}

template <bool whole, class D>
FASTMTO_INLINE void put(D* to, Pack<Compute<D>> x, int n) {
  if constexpr (whole) {
    store(to, x);
  } else {
    store_some(to, x, n);
  }
}

template <int states, bool whole, class S>
FASTMTO_INLINE void old_moments(const Rows& rows, int owner, std::int64_t at, int n, Pack<S>* s) {
  for (int k = 0; k < states; ++k) {
    const S* from = moment<S>(rows, k, owner, at);
    fetch_ahead(from);
    s[k] = take<whole>(from, n);
  }
}

template <int states, bool whole, class S>
FASTMTO_INLINE void new_moments(const Rows& rows, int owner, std::int64_t at, int n,
                                const Pack<S>* s) {
  for (int k = 0; k < states; ++k) put<whole>(moment<S>(rows, k, owner, at), s[k], n);
}

// body(offset, count, whole) over [0, n) in steps of `lanes`; whole is a compile-time bool.
template <int lanes, class Body>
FASTMTO_INLINE void vectors(std::int64_t n, Body body) {
  std::int64_t j = 0;
  for (; j + lanes <= n; j += lanes) body(j, lanes, std::true_type{});
  if (j < n) body(j, static_cast<int>(n - j), std::false_type{});
}

// gram takes two vectors at a time: zeros from n to the next multiple of 32.
template <class S>
FASTMTO_INLINE void pad(S* u, int tasks, int n) {
  constexpr int lanes = Pack<S>::lanes;
  for (int j = (n + lanes - 1) / lanes * lanes; j % 32 != 0; j += lanes) {
    for (int t = 0; t < tasks; ++t) store(u + t * kBlock + j, broadcast(S(0)));
  }
}

// Tasks first to last, which share the moments of `owner`.
template <int kind, class D>
FASTMTO_INLINE void updates_of(const Rows& rows, int first, int last, int owner, std::int64_t begin,
                               int n, Compute<D>* u) {
  using S = Compute<D>;
  using Rule = typename RuleOf<kind, S>::type;
  using V = Pack<S>;
  const Rule rule(rows.numbers[owner]);
  vectors<V::lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
    V s[Rule::states];
    old_moments<Rule::states, whole>(rows, owner, begin + j, count, s);
    for (int t = first; t < last; ++t) {
      const D* g = row<D>(rows, t, begin + j);
      fetch_ahead(g);
      store(u + t * kBlock + j, rule.update(s, take<whole>(g, count)));
    }
  });
}

template <int kind, class D>
void updates(const Rows& rows, std::int64_t begin, int n, void* u) {
  auto* out = static_cast<Compute<D>*>(u);
  if (rows.owners == 1) {
    updates_of<kind, D>(rows, 0, rows.tasks, 0, begin, n, out);
  } else {
    for (int t = 0; t < rows.tasks; ++t) updates_of<kind, D>(rows, t, t + 1, t, begin, n, out);
  }
  pad(out, rows.tasks, n);
}

// Row by row: the next block of a row is asked for while this one is copied.
template <class D>
void gradients(const Rows& rows, std::int64_t begin, int n, void* u) {
  using V = Pack<Compute<D>>;
  auto* out = static_cast<Compute<D>*>(u);
  for (int t = 0; t < rows.tasks; ++t) {
    const D* g = row<D>(rows, t, begin);
    Compute<D>* to = out + t * kBlock;
    vectors<V::lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
      __builtin_prefetch(g + j + kBlock);
      store(to + j, take<whole>(g + j, count));
    });
  }
  pad(out, rows.tasks, n);
}

template <class D>
void excess(const void* u, int tasks, const void* params, std::int64_t begin, int n,
            double lambda_rel, double lambda_abs, void* largest) {
  using S = Compute<D>;
  using V = Pack<S>;
  const S* rows = static_cast<const S*>(u);
  S* most = static_cast<S*>(largest);
  const D* theta = static_cast<const D*>(params) + begin;
  const V relative = broadcast(S(lambda_rel));
  const V absolute = broadcast(S(lambda_abs));
  vectors<V::lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
    const V inverse = broadcast(S(1)) / (relative * abs(take<whole>(theta + j, count)) + absolute);
    for (int t = 0; t < tasks; ++t) {
      S* lanes = most + t * 16;
      store(lanes, max(abs(load(rows + t * kBlock + j)) * inverse, load(lanes)));
    }
  });
}

#include "grams.h"

// Moments shared by the tasks: they move on the weighted gradient, after the parameters.
template <int kind, class D, bool known>
FASTMTO_INLINE void apply_shared(const Rows& rows, const Factors& factors, void* params,
                                 std::int64_t begin, std::int64_t end, const void* u,
                                 const int* u_rows) {
  using S = Compute<D>;
  using Rule = typename RuleOf<kind, S>::type;
  using V = Pack<S>;
  const Rule rule(rows.numbers[0]);
  const S* weight_u = static_cast<const S*>(factors.update);
  const S* weight_g = static_cast<const S*>(factors.grad);
  const S* held = static_cast<const S*>(u);
  const V decay = broadcast(S(factors.decay));
  D* theta = static_cast<D*>(params) + begin;
  vectors<V::lanes>(
      end - begin, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
        V s[Rule::states];
        old_moments<Rule::states, whole>(rows, 0, begin + j, count, s);
        fetch_ahead(theta + j);
        const V p = take<whole>(static_cast<const D*>(theta + j), count);
        V move = decay * p;
        V joint = broadcast(S(0));
        for (int t = 0; t < rows.tasks; ++t) {
          const D* from = row<D>(rows, t, begin + j);
          fetch_ahead(from);
          const V g = take<whole>(from, count);
          V update;
          if constexpr (known) {
            update = load(held + u_rows[t] * kBlock + j);
          } else {
            update = rule.update(s, g);
          }
          move = mul_add(broadcast(weight_u[t]), update, move);
          joint = mul_add(broadcast(weight_g[t]), g, joint);
        }
        put<whole>(theta + j, p - move, count);
        rule.advance(s, joint);
        new_moments<Rule::states, whole>(rows, 0, begin + j, count, s);
      });
}

// Moments of its own for every task (AdaTask); a task with factor 0 moves its moments only.
template <int kind, class D>
FASTMTO_INLINE void apply_per_task(const Rows& rows, const Factors& factors, void* params,
                                   std::int64_t begin, std::int64_t end) {
  using S = Compute<D>;
  using Rule = typename RuleOf<kind, S>::type;
  using V = Pack<S>;
  const S* weight = static_cast<const S*>(factors.update);
  const V decay = broadcast(S(factors.decay));
  alignas(64) S moves[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t n = end - at < kBlock ? end - at : kBlock;
    D* theta = static_cast<D*>(params) + at;
    vectors<V::lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
      store(moves + j, decay * take<whole>(static_cast<const D*>(theta + j), count));
    });
    for (int t = 0; t < rows.tasks; ++t) {
      const Rule rule(rows.numbers[t]);
      const V a = broadcast(weight[t]);
      const bool counts = weight[t] != 0;
      vectors<V::lanes>(
          n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
            V s[Rule::states];
            old_moments<Rule::states, whole>(rows, t, at + j, count, s);
            const D* from = row<D>(rows, t, at + j);
            fetch_ahead(from);
            const V g = take<whole>(from, count);
            if (counts) store(moves + j, mul_add(a, rule.update(s, g), load(moves + j)));
            rule.advance(s, g);
            new_moments<Rule::states, whole>(rows, t, at + j, count, s);
          });
    }
    vectors<V::lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
      const V p = take<whole>(static_cast<const D*>(theta + j), count);
      put<whole>(theta + j, p - load(moves + j), count);
    });
  }
}

template <int kind, class D>
void apply(const Rows& rows, const Factors& factors, void* params, std::int64_t begin,
           std::int64_t end) {
  if (factors.grad != nullptr) {
    apply_shared<kind, D, false>(rows, factors, params, begin, end, nullptr, nullptr);
  } else {
    apply_per_task<kind, D>(rows, factors, params, begin, end);
  }
}

template <int kind, class D>
void apply_known(const Rows& rows, const Factors& factors, void* params, std::int64_t begin,
                 std::int64_t end, const void* u, const int* u_rows) {
  apply_shared<kind, D, true>(rows, factors, params, begin, end, u, u_rows);
}

// `to` is aligned to 64 bytes.
template <class S>
FASTMTO_INLINE void write_past_caches(S* to, Pack<S> x) {
#if FASTMTO_LEVEL == 4
  _mm512_stream_si512((__m512i*)to, (__m512i)x.part[0]);
#elif FASTMTO_LEVEL == 3
  for (int i = 0; i < 2; ++i) _mm256_stream_si256((__m256i*)to + i, (__m256i)x.part[i]);
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)to + i, (__m128i)x.part[i]);
#else
  store(to, x);
#endif
}

// to[j] = what(j, count, whole) on n elements, past the caches where `stream` (of float and double).
template <int lanes, class D, class What>
FASTMTO_INLINE void write(D* to, std::int64_t n, bool stream, const What& what) {
  if constexpr (sizeof(D) == sizeof(Compute<D>)) {
    if (stream) {
      vectors<lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
        if constexpr (whole) {
          write_past_caches(to + j, what(j, count, whole));
        } else {
          store_some(to + j, what(j, count, whole), count);
        }
      });
      return;
    }
  }
  vectors<lanes>(n, [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
    put<whole>(to + j, what(j, count, whole), count);
  });
}

// n elements of a direction in the precision of the parameters. Drawn ones are float and stand in
// whole vectors.
template <bool whole, class S, class U>
FASTMTO_INLINE Pack<S> take_direction(const U* from, int n) {
  if constexpr (sizeof(U) == sizeof(S)) {
    return take<whole>(from, n);
  } else {
    typedef U Half __attribute__((vector_size(FASTMTO_VECTOR_BYTES / 2)));
    using V = Pack<S>;
    V r;
    for (int i = 0; i < V::parts; ++i) {
      Half half;
      std::memcpy(&half, from + i * (V::lanes / V::parts), sizeof half);
      r.part[i] = __builtin_convertvector(half, typename V::Part);
    }
    return r;
  }
}

template <class S, class U>
void shift(const void* params, const void* direction, double scale, void* out, int n, bool stream) {
  using V = Pack<S>;
  const S* from = static_cast<const S*>(params);
  const U* u = static_cast<const U*>(direction);
  S* to = static_cast<S*>(out);
  const V factor = broadcast(S(scale));
  const auto moved = [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
    return take<whole>(from + j, count) + factor * take_direction<whole, S>(u + j, count);
  };
  write<V::lanes>(to, n, stream, moved);
}

template <class D>
void combine(const void* const* grads, int tasks, const void* weights, void* out,
             std::int64_t begin, std::int64_t end, bool stream) {
  using S = Compute<D>;
  using V = Pack<S>;
  const S* a = static_cast<const S*>(weights);
  D* to = static_cast<D*>(out) + begin;
  const auto sum = [&](std::int64_t j, int count, auto whole) __attribute__((always_inline)) {
    V total = broadcast(S(0));
    for (int t = 0; t < tasks; ++t) {
      const D* from = static_cast<const D*>(grads[t]) + begin + j;
      fetch_ahead(from);
      total = mul_add(broadcast(a[t]), take<whole>(from, count), total);
    }
    return total;
  };
  write<V::lanes>(to, end - begin, stream, sum);
}

// NaN, infinite or at least `limit` in size, by the bits of the exponent.
template <class I, I exponent, I limit>
bool finite(const void* values, std::int64_t n) {
  typedef I Part __attribute__((vector_size(FASTMTO_VECTOR_BYTES)));
  constexpr int lanes = FASTMTO_VECTOR_BYTES / sizeof(I);
  const I* bits = static_cast<const I*>(values);
  const Part mask = exponent - Part{};
  // The answer is looked at only now and then.
  constexpr std::int64_t stretch = 16384;
  std::int64_t j = 0;
  while (j + lanes <= n) {
    const std::int64_t end = j + stretch < n ? j + stretch : n;
    Part bad = {};
    for (; j + lanes <= end; j += lanes) {
      fetch_ahead(bits + j);
      Part x;
      std::memcpy(&x, bits + j, sizeof x);
      bad |= (Part)((x & mask) >= limit);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      if (bad[lane] != 0) return false;
    }
  }
  for (; j < n; ++j) {
    if ((bits[j] & exponent) >= limit) return false;
  }
  return true;
}

#define FASTMTO_ROW(name, kind) \
  { name<kind, float>, name<kind, double>, name<kind, BFloat16>, name<kind, Float16> }
#define FASTMTO_TABLE(name)                                                             \
  {                                                                                     \
    FASTMTO_ROW(name, 0), FASTMTO_ROW(name, 1), FASTMTO_ROW(name, 2),                   \
    FASTMTO_ROW(name, 3), FASTMTO_ROW(name, 4), FASTMTO_ROW(name, 5),                   \
  }

}  // namespace FASTMTO_ISA

#define FASTMTO_GLUE(a, b) a##b
#define FASTMTO_NAME(isa) FASTMTO_GLUE(blocks_, isa)
const Blocks FASTMTO_NAME(FASTMTO_ISA) = [] {
  using namespace FASTMTO_ISA;
  return Blocks{
      FASTMTO_TABLE(updates),
      {gradients<float>, gradients<double>, gradients<BFloat16>, gradients<Float16>},
      {excess<float>, excess<double>, excess<BFloat16>, excess<Float16>},
      {gram<float>, gram<double>},
      FASTMTO_TABLE(apply),
      FASTMTO_TABLE(apply_known),
      {combine<float>, combine<double>, combine<BFloat16>, combine<Float16>},
      {gaussian, rademacher},
      {shift<float, float>, shift<double, double>, shift<double, float>},
      // 2^63 and 2^511, whose squares float and double still hold; all of float16 has squares.
      {finite<std::int32_t, 0x7f800000, 0x5f000000>,
       finite<std::int64_t, 0x7ff0000000000000, 0x5fe0000000000000>,
       finite<std::int16_t, 0x7f80, 0x5f00>, finite<std::int16_t, 0x7c00, 0x7c00>},
  };
}();

}  // namespace fastmto
