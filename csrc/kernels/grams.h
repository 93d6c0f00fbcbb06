// Inner products of rows of a block. Part of loops.h.

// into[l] += lane l, and lane l + 8 with 16 of them; in double, in this order.
FASTMTO_INLINE void add_widened(Pack<float> x, double* into) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef double Wide __attribute__((vector_size(64)));
  Eight half[2];
  std::memcpy(&half[0], &x, sizeof half[0]);
  std::memcpy(&half[1], reinterpret_cast<const char*>(&x) + sizeof half[0], sizeof half[1]);
  Wide sum;
  std::memcpy(&sum, into, sizeof sum);
  sum += __builtin_convertvector(half[0], Wide) + __builtin_convertvector(half[1], Wide);
  std::memcpy(into, &sum, sizeof sum);
}
FASTMTO_INLINE void add_widened(Pack<double> x, double* into) { store(into, load(into) + x); }

// Pairs of rows a.. (A of them) and b.. (B of them); on the diagonal a == b and only i <= j count.
template <class S, int A, int B, bool diagonal, bool ahead = false>
FASTMTO_INLINE void gram_tile(const S* u, std::int64_t stride, int tasks, int a, int b, int n, double* lanes) {
  using V = Pack<S>;
  // Two sets of sums where one would leave the adders waiting for each other.
  constexpr int sets = A * B <= 4 ? 2 : 1;
  V sum[sets][A][B];
#pragma GCC unroll 16
  for (int i = 0; i < sets * A * B; ++i) (&sum[0][0][0])[i] = broadcast(S(0));
  const int padded = (n + sets * V::lanes - 1) / (sets * V::lanes) * (sets * V::lanes);
  for (int j = 0; j < padded; j += sets * V::lanes) {
#pragma GCC unroll 2
    for (int set = 0; set < sets; ++set) {
      const S* at = u + j + set * V::lanes;
      V left[A], right[B];
      if constexpr (ahead) {
#pragma GCC unroll 4
        for (int i = 0; i < B; ++i) fetch_ahead(at + (b + i) * stride);
      }
#pragma GCC unroll 4
      for (int i = 0; i < A; ++i) left[i] = load(at + (a + i) * stride);
#pragma GCC unroll 4
      for (int i = 0; i < B; ++i) right[i] = load(at + (b + i) * stride);
#pragma GCC unroll 16
      for (int pair = 0; pair < A * B; ++pair) {
        const int i = pair / B, k = pair % B;
        if (diagonal && k < i) continue;
        sum[set][i][k] = mul_add(left[i], right[k], sum[set][i][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < A; ++i) {
    const int line = a + i;
    double* first = lanes + 8 * (line * tasks - line * (line - 1) / 2 - line);
#pragma GCC unroll 4
    for (int k = 0; k < B; ++k) {
      if (diagonal && k < i) continue;
      V total = sum[0][i][k];
      if constexpr (sets == 2) total = total + sum[1][i][k];
      add_widened(total, first + 8 * (b + k));
    }
  }
}

template <class S>
void gram(const void* u, std::int64_t stride, int tasks, int n, double* lanes) {
  constexpr int R = 4;
  const S* rows = static_cast<const S*>(u);
  switch (tasks) {
    case 1:
      return gram_tile<S, 1, 1, true, true>(rows, stride, tasks, 0, 0, n, lanes);
    case 2:
      return gram_tile<S, 2, 2, true, true>(rows, stride, tasks, 0, 0, n, lanes);
    case 3:
      return gram_tile<S, 3, 3, true, true>(rows, stride, tasks, 0, 0, n, lanes);
  }
  for (int a = 0; a < tasks; a += R) {
    switch (tasks - a) {
      case 1:
        gram_tile<S, 1, 1, true>(rows, stride, tasks, a, a, n, lanes);
        break;
      case 2:
        gram_tile<S, 2, 2, true>(rows, stride, tasks, a, a, n, lanes);
        break;
      case 3:
        gram_tile<S, 3, 3, true>(rows, stride, tasks, a, a, n, lanes);
        break;
      default:
        gram_tile<S, R, R, true>(rows, stride, tasks, a, a, n, lanes);
    }
    for (int b = a + R; b < tasks; b += R) {
      switch (tasks - b) {
        case 1:
          gram_tile<S, R, 1, false>(rows, stride, tasks, a, b, n, lanes);
          break;
        case 2:
          gram_tile<S, R, 2, false>(rows, stride, tasks, a, b, n, lanes);
          break;
        case 3:
          gram_tile<S, R, 3, false>(rows, stride, tasks, a, b, n, lanes);
          break;
        default:
          gram_tile<S, R, R, false>(rows, stride, tasks, a, b, n, lanes);
      }
    }
  }
}
