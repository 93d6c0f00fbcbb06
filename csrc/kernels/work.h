// What the passes share: how P is cut into items, items go to threads, and what stays in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "kernels.h"

namespace fastmto {

// Below this many elements read, a region of threads costs more than it saves.
constexpr std::int64_t kSerial = 1 << 16;
// Items that P is cut into, at most, before tensors' borders cut further.
constexpr std::int64_t kItems = 128;
// From here on an output does not fit the caches and is better written past them.
constexpr std::int64_t kStreamBytes = 1 << 23;

inline int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline int compute_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Threads worth having for `items` items of `work` elements altogether.
inline int useful(int threads, std::int64_t items, std::int64_t work) {
#ifdef _OPENMP
  if (work >= kSerial) return static_cast<int>(std::min<std::int64_t>(threads, items));
#else
  (void)threads, (void)items, (void)work;
#endif
  return 1;
}

// body(item, thread) for every item; which thread takes which makes no difference to any result.
template <class Body>
void in_parallel(std::int64_t items, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t i = 0; i < items; ++i) body(i, omp_get_thread_num());
    return;
  }
#else
  (void)threads;
#endif
  for (std::int64_t i = 0; i < items; ++i) body(i, 0);
}

// After writes past the caches: other threads see them before what this one writes next.
inline void order_writes(bool streamed) {
#ifdef __SSE2__
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

// Memory that stays with the calling thread: a training loop allocates in its first step only.
class Arena {
 public:
  // At least `bytes` bytes, aligned to a cache line, valid until the next call.
  char* take(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset(new char[bytes + 64]);
      size_ = bytes;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    return memory_.get() + (64 - address % 64) % 64;
  }

 private:
  std::unique_ptr<char[]> memory_;
  std::size_t size_ = 0;
};

// A stretch of P: either whole small tensors, or (a part of) one tensor.
struct Item {
  std::int64_t begin, end;
  int first, last;  // segments; last = first + 1 for parts
  bool whole;       // every tensor in it is complete
};

inline std::int64_t chunk_of(std::int64_t numel) {
  const std::int64_t even = (numel + kItems - 1) / kItems;
  return std::max<std::int64_t>(8 * kBlock, (even + kBlock - 1) / kBlock * kBlock);
}

// At most about 3 kItems items, whatever the number of segments.
inline void cut(const std::int64_t* segments, int n_segments, std::vector<Item>& items) {
  items.clear();
  const std::int64_t chunk = chunk_of(segments[n_segments]);
  for (int s = 0; s < n_segments;) {
    const std::int64_t begin = segments[s];
    if (segments[s + 1] - begin > chunk) {
      for (std::int64_t at = begin; at < segments[s + 1]; at += chunk) {
        items.push_back({at, std::min(at + chunk, segments[s + 1]), s, s + 1, false});
      }
      ++s;
      continue;
    }
    int last = s + 1;
    while (last < n_segments && segments[last + 1] - begin <= chunk) ++last;
    items.push_back({begin, segments[last], s, last, true});
    s = last;
  }
}

inline std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace fastmto
