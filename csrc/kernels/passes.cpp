// The passes of kernels.h: P is cut into items, the items go to threads, their sums are combined
// in the order of the items.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "blocks.h"
#include "kernels.h"

namespace fastmto {
namespace {

// Below this many elements read, a region of threads costs more than it saves.
constexpr std::int64_t kSerial = 1 << 16;
// Items that P is cut into, at most, before tensors' borders cut further.
constexpr std::int64_t kItems = 128;
// From here on an output does not fit the caches and is better written past them.
constexpr std::int64_t kStreamBytes = 1 << 23;
// Rows of a Gram that are read where they are; blocks of more would push each other out of the
// caches where the rows stand a power of 2 apart.
constexpr int kInPlace = 16;

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

// The estimates of v4 clamp roots to about 1e-19, which an ordinary eps hides.
const Blocks& blocks_for(const Update& update) {
  if (update.isa == Isa::best && update.dtype != DType::f64) {
    const int owners = update.per_task ? update.tasks : 1;
    for (int i = 0; i < owners; ++i) {
      const Numbers& c = update.numbers[i];
      if (c.active != 0 && c.eps < 2e-12 * std::max(1.0, c.c2)) {
        return blocks_of(supported(Isa::v3) ? Isa::v3 : Isa::baseline);
      }
    }
  }
  return blocks_of(update.isa);
}

int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

int compute_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Threads worth having for `items` items of `work` elements altogether.
int useful(int threads, std::int64_t items, std::int64_t work) {
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
void order_writes(bool streamed) {
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

// The tasks that take part, with their rows.
struct Tasks {
  std::vector<int> index;  // in the caller's numbering
  std::vector<const void*> grads;
  std::vector<void*> state;
  std::vector<Numbers> numbers;
  Rows rows;

  // Refills the vectors, whose memory is kept from call to call.
  template <class Keep>
  void fill(const Update& update, const Keep& keep) {
    index.clear();
    grads.clear();
    state.clear();
    numbers.clear();
    const int size = size_of(update.dtype);
    for (int i = 0; i < update.tasks; ++i) {
      if (update.numbers[update.per_task ? i : 0].active == 0 || !keep(i)) continue;
      index.push_back(i);
      grads.push_back(static_cast<const char*>(update.grads.data) + i * update.grads.stride * size);
      if (update.per_task) numbers.push_back(update.numbers[i]);
    }
    if (!update.per_task) numbers.push_back(update.numbers[0]);
    const int width = compute_size(update.dtype);
    for (const Matrix& moments : update.state) {
      char* data = static_cast<char*>(moments.data);
      if (!update.per_task) {
        state.push_back(data);
      } else {
        for (const int i : index) {
          state.push_back(data == nullptr ? nullptr : data + i * moments.stride * width);
        }
      }
    }
    rows = Rows{static_cast<int>(index.size()), grads.data(), state.data(),
                update.per_task ? static_cast<int>(index.size()) : 1, numbers.data()};
  }
};

// A stretch of P: either whole small tensors, or (a part of) one tensor.
struct Item {
  std::int64_t begin, end;
  int first, last;  // segments; last = first + 1 for parts
  bool whole;       // every tensor in it is complete
};

std::int64_t chunk_of(std::int64_t numel) {
  const std::int64_t even = (numel + kItems - 1) / kItems;
  return std::max<std::int64_t>(8 * kBlock, (even + kBlock - 1) / kBlock * kBlock);
}

// At most about 3 kItems items, whatever the number of segments.
void cut(const std::int64_t* segments, int n_segments, std::vector<Item>& items) {
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

std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// These stay with the calling thread; the threads of a region reach them through references.
thread_local Arena search_arena, apply_arena;
thread_local Tasks search_tasks, apply_tasks;
thread_local std::vector<Item> search_items, apply_items;

// The first active row of numbers, whose rates are those of the step; null where no task takes part.
const Numbers* first_active(const Update& update) {
  const int owners = update.per_task ? update.tasks : 1;
  for (int i = 0; i < owners; ++i) {
    if (update.numbers[i].active != 0) return update.numbers + i;
  }
  return nullptr;
}

double clippy_factor(double lr, double largest) {
  const double ratio = lr * largest;
  return ratio > 1 ? 1 / ratio : 1;
}

// Memory of one search: for every thread the updates of a block, the Gram's lanes, the largest
// ratios of Clippy and the sums of one small tensor; for every item its sums and largest ratios.
class Workspace {
 public:
  Workspace(Arena& arena, int tasks, int pairs, bool wide, int threads, std::int64_t items)
      : updates_(0),
        lanes_(aligned(updates_ + std::size_t(wide ? 8 : 4) * kBlock * tasks)),
        largest_(lanes_ + std::size_t(64) * pairs),
        sums_(largest_ + std::size_t(128) * tasks),
        slot_(aligned(sums_ + 8 * std::size_t(pairs + tasks))),
        result_(aligned(8 * std::size_t(pairs + tasks))),
        results_(slot_ * threads),
        data_(arena.take(results_ + result_ * (items + 1))) {}

  char* updates(int slot) const { return data_ + slot_ * slot + updates_; }
  double* lanes(int slot) const { return doubles(slot_ * slot + lanes_); }
  char* largest(int slot) const { return data_ + slot_ * slot + largest_; }
  double* sums(int slot) const { return doubles(slot_ * slot + sums_); }
  double* result(std::int64_t item) const { return doubles(results_ + result_ * item); }

 private:
  double* doubles(std::size_t at) const { return reinterpret_cast<double*>(data_ + at); }

  std::size_t updates_, lanes_, largest_, sums_, slot_, result_, results_;
  char* data_;
};

// What the Gram is taken of.
struct Source {
  void (*fill)(const Rows& rows, std::int64_t begin, int n, void* u);  // a block of it
  bool in_place;  // the gradients themselves: whole blocks need no filling
};

// `after(begin, n, u)` follows every block of at most kBlock coordinates, while its updates u are
// at hand; not with a source in place.
template <class After>
void gather(const Update& update, const Clip* clip, const Blocks& blocks, const Source& source,
            double* gram, const After& after) {
  Tasks& tasks = search_tasks;
  std::vector<Item>& items = search_items;
  tasks.fill(update, [](int) { return true; });
  const int T = tasks.rows.tasks;
  const int pairs = T * (T + 1) / 2;
  const auto dtype = static_cast<int>(update.dtype);
  const bool wide = update.dtype == DType::f64;
  const std::int64_t whole[2] = {0, update.numel};
  if (clip != nullptr) {
    cut(clip->segments, clip->n_segments, items);
    std::fill(clip->sigma, clip->sigma + std::int64_t(update.tasks) * clip->n_segments, 1.0);
  } else {
    cut(whole, 1, items);
  }
  const auto n_items = static_cast<std::int64_t>(items.size());
  const int threads = useful(update.threads, n_items, update.numel * (T + 2));
  const Workspace memory(search_arena, T, pairs, wide, threads, n_items);

  // The plain Gram and the largest ratios of [begin, end) into sums (pairs, then tasks).
  const auto sum_up = [&](std::int64_t begin, std::int64_t end, int slot, double* sums) {
    double* lanes = memory.lanes(slot);
    char* largest = memory.largest(slot);
    char* u = memory.updates(slot);
    std::fill(lanes, lanes + 8 * pairs, 0.0);
    if (clip != nullptr) std::memset(largest, 0, std::size_t(128) * T);
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const int n = static_cast<int>(std::min<std::int64_t>(kBlock, end - at));
      if (source.in_place && n == kBlock) {
        const char* first = static_cast<const char*>(update.grads.data) + at * (wide ? 8 : 4);
        blocks.gram[wide](first, update.grads.stride, T, n, lanes);
        continue;
      }
      source.fill(tasks.rows, at, n, u);
      if (clip != nullptr) {
        blocks.excess[dtype](u, T, clip->params, at, n, clip->lambda_rel, clip->lambda_abs,
                             largest);
      }
      blocks.gram[wide](u, kBlock, T, n, lanes);
      after(at, n, u);
    }
    for (int pair = 0; pair < pairs; ++pair) {
      sums[pair] = 0;
      for (int lane = 0; lane < 8; ++lane) sums[pair] += lanes[8 * pair + lane];
    }
    for (int t = 0; t < T; ++t) {
      double most = 0;
      for (int lane = 0; clip != nullptr && lane < 16; ++lane) {
        const int at = 16 * t + lane;
        most = std::max(most, wide ? reinterpret_cast<double*>(largest)[at]
                                   : double(reinterpret_cast<float*>(largest)[at]));
      }
      sums[pairs + t] = most;
    }
  };

  // total += sigma_i sigma_j sums_ij with the sigma of tensor s, which is written down.
  const auto add_clipped = [&](double* sums, int s, double* total) {
    for (int t = 0; t < T; ++t) {
      const double lr = tasks.rows.numbers[update.per_task ? t : 0].lr;
      sums[pairs + t] = clippy_factor(lr, sums[pairs + t]);
      clip->sigma[std::int64_t(tasks.index[t]) * clip->n_segments + s] = sums[pairs + t];
    }
    for (int i = 0, pair = 0; i < T; ++i) {
      for (int j = i; j < T; ++j, ++pair) {
        total[pair] += sums[pairs + i] * sums[pairs + j] * sums[pair];
      }
    }
  };

  in_parallel(n_items, threads, [&](std::int64_t i, int slot) {
    const Item& item = items[i];
    double* result = memory.result(i);
    if (clip == nullptr || !item.whole) {
      sum_up(item.begin, item.end, slot, result);
      return;
    }
    std::fill(result, result + pairs, 0.0);
    for (int s = item.first; s < item.last; ++s) {
      sum_up(clip->segments[s], clip->segments[s + 1], slot, memory.sums(slot));
      add_clipped(memory.sums(slot), s, result);
    }
  });

  double* total = memory.result(n_items);
  std::fill(total, total + pairs, 0.0);
  for (std::int64_t i = 0; i < n_items;) {
    double* result = memory.result(i);
    if (clip == nullptr || items[i].whole) {
      for (int pair = 0; pair < pairs; ++pair) total[pair] += result[pair];
      ++i;
      continue;
    }
    const int s = items[i].first;
    for (++i; i < n_items && items[i].first == s; ++i) {
      const double* part = memory.result(i);
      for (int pair = 0; pair < pairs; ++pair) result[pair] += part[pair];
      for (int t = pairs; t < pairs + T; ++t) result[t] = std::max(result[t], part[t]);
    }
    add_clipped(result, s, total);
  }
  std::fill(gram, gram + std::int64_t(update.tasks) * update.tasks, 0.0);
  for (int i = 0, pair = 0; i < T; ++i) {
    for (int j = i; j < T; ++j, ++pair) {
      const std::int64_t a = tasks.index[i], b = tasks.index[j];
      gram[a * update.tasks + b] = gram[b * update.tasks + a] = total[pair];
    }
  }
}

// The tasks that move something in a step and their factors, one set a segment where Clippy's
// sigma are given.
struct Move {
  const Rows& rows;
  char* factors;  // S: for every segment T of lr weights sigma; then T weights
  int size;       // of S
  int sets;
  double decay;
  bool shared;

  Factors of(int segment) const {
    const std::int64_t row = std::int64_t(size) * rows.tasks;
    return {factors + row * segment, shared ? factors + row * sets : nullptr, decay};
  }
};

template <class S>
void fill_factors(const Step& step, double lr, const std::vector<int>& index, int sets, void* out) {
  S* factor = static_cast<S*>(out);
  for (int s = 0; s < sets; ++s) {
    for (const int i : index) {
      double a = lr * step.weights[i];
      if (step.sigma != nullptr) a *= step.sigma[std::int64_t(i) * step.n_segments + s];
      *factor++ = S(a);
    }
  }
  for (const int i : index) *factor++ = S(step.weights[i]);
}

bool skipped(const Step& step) { return step.skip != nullptr && *step.skip != 0; }

// For passes over the gradients as they are.
Update without_rule(DType dtype, int tasks, std::int64_t numel, Matrix grads, int threads,
                    Isa isa) {
  static constexpr Numbers present{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1};
  Update update{};
  update.dtype = dtype;
  update.tasks = tasks;
  update.numel = numel;
  update.grads = grads;
  update.numbers = &present;
  update.threads = threads;
  update.isa = isa;
  return update;
}

// `rates`: the first active row.
Move plan(const Update& update, const Step& step, const Numbers& rates) {
  Tasks& tasks = apply_tasks;
  tasks.fill(update, [&](int i) { return update.per_task || step.weights[i] != 0; });
  const int sets = step.sigma != nullptr ? step.n_segments : 1;
  const int size = compute_size(update.dtype);
  char* factors = apply_arena.take(std::size_t(size) * tasks.rows.tasks * (sets + 1));
  if (size == 8) {
    fill_factors<double>(step, rates.lr, tasks.index, sets, factors);
  } else {
    fill_factors<float>(step, rates.lr, tasks.index, sets, factors);
  }
  return {tasks.rows, factors, size, sets, rates.decay, !update.per_task};
}

}  // namespace

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

void update_gram(const Update& update, const Clip* clip, double* gram) {
  const Blocks& blocks = blocks_for(update);
  const Source updates{blocks.updates[update.kind][static_cast<int>(update.dtype)], false};
  gather(update, clip, blocks, updates, gram, [](std::int64_t, int, const char*) {});
}

void apply(const Update& update, const Step& step) {
  const Numbers* const rates = first_active(update);
  if (rates == nullptr || skipped(step)) return;
  const Move move = plan(update, step, *rates);
  const auto function = blocks_for(update).apply[update.kind][static_cast<int>(update.dtype)];
  std::vector<Item>& items = apply_items;
  const std::int64_t whole[2] = {0, update.numel};
  if (step.sigma != nullptr) {
    cut(step.segments, step.n_segments, items);
  } else {
    cut(whole, 1, items);
  }
  const auto n_items = static_cast<std::int64_t>(items.size());
  const int threads = useful(update.threads, n_items, update.numel * (update.tasks + 3));
  in_parallel(n_items, threads, [&](std::int64_t i, int) {
    const Item& item = items[i];
    if (!item.whole || step.sigma == nullptr) {
      function(move.rows, move.of(item.first), step.params, item.begin, item.end);
      return;
    }
    for (int s = item.first; s < item.last; ++s) {
      function(move.rows, move.of(s), step.params, step.segments[s], step.segments[s + 1]);
    }
  });
}

void apply_and_gram(const Update& update, const Step& step, double* gram) {
  const Numbers* const rates = first_active(update);
  if (rates == nullptr || skipped(step)) return update_gram(update, nullptr, gram);
  const Blocks& blocks = blocks_for(update);
  const auto dtype = static_cast<int>(update.dtype);
  const Source updates{blocks.updates[update.kind][dtype], false};
  const Move move = plan(update, step, *rates);
  const Factors factors = move.of(0);
  if (update.per_task) {
    const auto function = blocks.apply[update.kind][dtype];
    gather(update, nullptr, blocks, updates, gram, [&](std::int64_t begin, int n, const char*) {
      function(move.rows, factors, step.params, begin, begin + n);
    });
  } else {
    // Without absent tasks the updates of task i stand in row i.
    const auto function = blocks.apply_known[update.kind][dtype];
    const int* index = apply_tasks.index.data();
    gather(update, nullptr, blocks, updates, gram, [&](std::int64_t begin, int n, const char* u) {
      function(move.rows, factors, step.params, begin, begin + n, u, index);
    });
  }
}

void gram(DType dtype, int tasks, std::int64_t numel, Matrix grads, double* gram, int threads,
          Isa isa) {
  const Blocks& blocks = blocks_of(isa);
  const Source gradients{blocks.gradients[static_cast<int>(dtype)],
                         size_of(dtype) == compute_size(dtype) && tasks <= kInPlace};
  gather(without_rule(dtype, tasks, numel, grads, threads, isa), nullptr, blocks, gradients, gram,
         [](std::int64_t, int, const char*) {});
}

void combine(DType dtype, int tasks, std::int64_t numel, Matrix grads, const double* weights,
             void* out, int threads, Isa isa) {
  const Update update = without_rule(dtype, tasks, numel, grads, threads, isa);
  Step step{};
  step.weights = weights;
  const Move move = plan(update, step, *update.numbers);
  std::vector<Item>& items = apply_items;
  const std::int64_t whole[2] = {0, numel};
  cut(whole, 1, items);
  const auto n_items = static_cast<std::int64_t>(items.size());
  const int size = size_of(dtype);
  // Not in place: there the caches hold what is written over.
  const auto& rows = apply_tasks.grads;
  const bool stream = numel * size >= kStreamBytes &&
                      reinterpret_cast<std::uintptr_t>(out) % 64 == 0 &&
                      std::find(rows.begin(), rows.end(), out) == rows.end();
  const auto function = blocks_of(isa).combine[static_cast<int>(dtype)];
  const void* factors = move.of(0).grad;
  in_parallel(n_items, useful(threads, n_items, numel * (tasks + 1)), [&](std::int64_t i, int) {
    function(move.rows.grads, move.rows.tasks, factors, out, items[i].begin, items[i].end, stream);
    order_writes(stream);
  });
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

void step_constants(int rows, const Hyper* hyper, const std::int64_t* counts, const std::int32_t* active,
           Numbers* numbers, std::int32_t* found) {
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

void count_step(int rows, std::int64_t* counts, const std::int32_t* active, const std::int32_t* found,
             std::int64_t* tally) {
  if (*found != 0) {
    ++tally[1];
    return;
  }
  for (int r = 0; r < rows; ++r) counts[r] += active[r] != 0;
  ++tally[0];
}

}  // namespace fastmto
