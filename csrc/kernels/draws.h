// Random directions: fastmto/philox.py has the equations, the sources and the order of every
// rounding. Part of loops.h. One native vector at a time: a lane is a block of Philox.

typedef std::uint64_t Longs __attribute__((vector_size(FASTMTO_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(FASTMTO_VECTOR_BYTES)));
constexpr int kWidth = FASTMTO_VECTOR_BYTES / 4;  // lanes of 32 bits
constexpr int kLanes = 16;                        // blocks that stand beside each other

// The product of m and the low half of every lane.
FASTMTO_INLINE Longs times(Longs a, std::uint64_t m) {
  const Longs b = m - Longs{};
#if FASTMTO_LEVEL == 4
  return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FASTMTO_LEVEL == 3
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * b;
#endif
}

// What the blocks of one direction share: its number, and the key of every round, in memory, where
// it needs no register.
struct Direction {
  static constexpr int rounds = 10;
  std::uint64_t number;
  std::uint64_t k0[rounds], k1[rounds];

  Direction(std::uint64_t seed, std::uint64_t which) : number(which) {
    auto a = static_cast<std::uint32_t>(seed), b = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < rounds; ++round) {
      k0[round] = a;
      k1[round] = b;
      a += 0x9e3779b9;
      b += 0xbb67ae85;
    }
  }
};

// Philox4x32-10 of counters (block, number). The upper halves of x are of no meaning.
FASTMTO_INLINE void philox(Longs block, const Direction& of, Longs* x) {
  Longs c0 = block, c1 = block >> 32;
  Longs c2 = of.number - Longs{}, c3 = (of.number >> 32) - Longs{};
#pragma GCC unroll 10
  for (int round = 0; round < Direction::rounds; ++round) {
    const Longs p0 = times(c0, 0xd2511f53), p1 = times(c2, 0xcd9e8d57);
    c0 = (p1 >> 32) ^ c1 ^ (of.k0[round] - Longs{});
    c2 = (p0 >> 32) ^ c3 ^ (of.k1[round] - Longs{});
    c1 = p1;
    c3 = p0;
  }
  x[0] = c0, x[1] = c1, x[2] = c2, x[3] = c3;
}

// The words of blocks first to first + kWidth - 1.
FASTMTO_INLINE void words(std::uint64_t first, const Direction& of, Bits* x) {
  constexpr std::uint64_t steps[] = {0, 2, 4, 6, 8, 10, 12, 14};
  Longs even, a[4], b[4];
  std::memcpy(&even, steps, sizeof even);
  even += first;
  philox(even, of, a);
  philox(even + 1, of, b);
  for (int j = 0; j < 4; ++j) x[j] = (Bits)((a[j] & 0xffffffffu) | (b[j] << 32));
}

template <int n>
FASTMTO_INLINE Floats polynomial(const float (&coefficients)[n], Floats x) {
  Floats value = coefficients[n - 1] - Floats{};
#pragma GCC unroll 8
  for (int k = n - 2; k >= 0; --k) value = value * x + coefficients[k];
  return value;
}

// Two normal numbers a lane.
FASTMTO_INLINE void normal_pair(Bits a, Bits b, Floats* z) {
  constexpr float log_of[] = {-2.0f,
                              1.0000057220458984f,
                              -0.6667017936706543f,
                              0.4994677007198334f,
                              -0.3978799283504486f,
                              0.3440312147140503f,
                              -0.32557979226112366f,
                              0.2069597840309143f};
  constexpr float sine_of[] = {-0.16666655242443085f, 0.008332177996635437f,
                               -0.0001951729936990887f};
  constexpr float cosine_of[] = {-0.49999895691871643f, 0.04165629297494888f,
                                 -0.0013597822980955243f};
  const Floats scaled = __builtin_convertvector((Ints)(a >> 1), Floats) + 0.5f;
  const Ints bits = (Ints)scaled - 0x4eb504f3;
  const Floats exponent = __builtin_convertvector(bits >> 23, Floats);
  const Floats t = (Floats)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const Floats log = exponent * -1.3862943649291992f + t * polynomial(log_of, t);
  const Floats w = __builtin_convertvector((Ints)(b << 2), Floats) * 3.65729529994141e-10f;
  const Floats w2 = w * w;
  const Floats sine = w + w2 * w * polynomial(sine_of, w2);
  const Floats cosine = 1.0f + w2 * polynomial(cosine_of, w2);
  const Floats r = (Floats)((Bits)root_part(log) ^ (b & 0x80000000u));
  const Bits exchanged = (Bits)((b & 0x40000000u) != 0);
  z[0] = r * (exchanged ? sine : cosine);
  z[1] = r * (exchanged ? cosine : sine);
}

// u[j] for coordinate begin + j, j < n and on to the next multiple of 64; begin a multiple of 64.
void gaussian(std::uint64_t seed, std::uint64_t number, std::int64_t begin, int n, float* u) {
  const Direction of(seed, number);
  for (int j = 0; j < n; j += 4 * kLanes) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      Bits x[4];
      words((begin + j) / 4 + lane, of, x);
      Floats z[4];
      normal_pair(x[0], x[1], z);
      normal_pair(x[2], x[3], z + 2);
      for (int k = 0; k < 4; ++k) std::memcpy(u + j + kLanes * k + lane, &z[k], sizeof z[k]);
    }
  }
}

// u[j] for coordinate begin + j, j < n and on to the next multiple of kDrawn; begin one too.
void rademacher(std::uint64_t seed, std::uint64_t number, std::int64_t begin, int n, float* u) {
  static_assert(kDrawn == 128 * kLanes);
  const Direction of(seed, number);
  for (int j = 0; j < n; j += kDrawn) {
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      Bits x[4];
      words((begin + j) / 128 + lane, of, x);
      for (int k = 0; k < 128; ++k) {
        const Bits sign = (x[k / 32] << (31 - k % 32)) & 0x80000000u;
        const Bits one = sign | 0x3f800000u;
        std::memcpy(u + j + kLanes * k + lane, &one, sizeof one);
      }
    }
  }
}
