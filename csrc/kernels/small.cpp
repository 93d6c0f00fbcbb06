// What is left of kernels.h: instruction sets, perturb, the check, the step's constants and count.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tasks.h"

namespace fastmto {

const Blocks& blocks_of(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  switch (isa) {
    case Isa::baseline:
      return blocks_baseline;
    case Isa::v3:
      return blocks_v3;
    case Isa::v4:
      return blocks_v4;
    case Isa::best:
      break;
  }
  static const Blocks& best = supported(Isa::v4)   ? blocks_v4
                              : supported(Isa::v3) ? blocks_v3
                                                   : blocks_baseline;
  return best;
#else
  (void)isa;
  return blocks_baseline;
#endif
}

bool supported(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  // gcc 11 knows the levels' features, but not the levels' names here.
  const auto v3 = [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
  };
  if (isa == Isa::v3) return v3();
  if (isa == Isa::v4) {
    return v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  return true;
#else
  return isa == Isa::best || isa == Isa::baseline;
#endif
}

void perturb(const Perturbation& what) {
  const Blocks& blocks = blocks_of(what.isa);
  const std::int64_t size = size_of(what.dtype);
  const bool given = what.draw == Draw::given;
  const auto shift = blocks.shift[what.dtype == DType::f32 ? 0 : given ? 1 : 2];
  const auto draw = given ? nullptr : blocks.draw[what.draw == Draw::gaussian ? 0 : 1];
  const char* params = static_cast<const char*>(what.params);
  char* out = static_cast<char*>(what.out.data);
  const char* directions = static_cast<const char*>(what.direction.data);
  // Not in place: there the caches hold what is written over.
  const bool stream = what.rows * what.numel * size >= kStreamBytes && out != params &&
                      reinterpret_cast<std::uintptr_t>(out) % 64 == 0 &&
                      what.out.stride * size % 64 == 0;
  const std::int64_t blocks_of_numel = (what.numel + kDrawn - 1) / kDrawn;
  const std::int64_t a_chunk = std::max<std::int64_t>(2, (blocks_of_numel + kItems - 1) / kItems);
  const std::int64_t chunk = a_chunk * kDrawn;
  const std::int64_t items = (what.numel + chunk - 1) / chunk;
  in_parallel(items, useful(what.threads, items, what.numel * what.rows), [&](std::int64_t i, int) {
    alignas(64) float drawn[kDrawn];
    const std::int64_t end = std::min((i + 1) * chunk, what.numel);
    for (std::int64_t at = i * chunk; at < end; at += kDrawn) {
      const int n = static_cast<int>(std::min<std::int64_t>(kDrawn, end - at));
      for (int r = 0; r < what.rows; ++r) {
        const void* u = drawn;
        if (given) {
          u = directions + (r * what.direction.stride + at) * size;
        } else {
          draw(what.seed, what.offset + static_cast<std::uint64_t>(r), at, n, drawn);
        }
        shift(params + at * size, u, what.scale[r], out + (r * what.out.stride + at) * size, n,
              stream);
      }
    }
    order_writes(stream);
  });
}

bool all_finite(DType dtype, std::int64_t rows, std::int64_t numel, Matrix values, int threads,
                Isa isa) {
  const auto function = blocks_of(isa).finite[static_cast<int>(dtype)];
  const int size = size_of(dtype);
  const char* data = static_cast<const char*>(values.data);
  const std::int64_t chunk = chunk_of(numel);
  const std::int64_t chunks = (numel + chunk - 1) / chunk;
  std::atomic<bool> finite{true};
  in_parallel(rows * chunks, useful(threads, rows * chunks, rows * numel),
              [&](std::int64_t i, int) {
                if (!finite.load(std::memory_order_relaxed)) return;
                const std::int64_t begin = i % chunks * chunk;
                const char* from = data + (i / chunks * values.stride + begin) * size;
                if (!function(from, std::min(chunk, numel - begin))) {
                  finite.store(false, std::memory_order_relaxed);
                }
              });
  return finite.load();
}

void step_constants(int rows, const Hyper* hyper, const std::int64_t* counts,
                    const std::int32_t* active, Numbers* numbers, std::int32_t* found) {
  for (int r = 0; r < rows; ++r) {
    numbers[r] = Numbers{};
    if (active[r] == 0) continue;
    const Hyper& h = hyper[r];
    // Most rows are like the one before them, and powers are slow.
    if (r > 0 && active[r - 1] != 0 && counts[r] == counts[r - 1] &&
        std::memcmp(&h, &hyper[r - 1], sizeof h) == 0) {
      numbers[r] = numbers[r - 1];
      continue;
    }
    const auto step = static_cast<double>(counts[r] + 1);
    const bool corrected = h.corrected != 0;
    const double c1 = corrected ? 1 / (1 - std::pow(h.b1, step)) : 0;
    const double c2 = corrected ? std::pow(1 - std::pow(h.b2, step), -0.5) : 0;
    const double decay = h.lr * h.weight_decay;
    numbers[r] = {h.b1, 1 - h.b1, h.b2, 1 - h.b2, c1, c2, h.eps, h.mu, h.lr, decay, 1};
  }
  *found = 0;
}

void count_step(int rows, std::int64_t* counts, const std::int32_t* active,
                const std::int32_t* found, std::int64_t* tally) {
  if (*found != 0) {
    ++tally[1];
    return;
  }
  for (int r = 0; r < rows; ++r) counts[r] += active[r] != 0;
  ++tally[0];
}

}  // namespace fastmto
