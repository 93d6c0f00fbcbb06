// Gram matrices of kernels.h: every item's sums, combined in the order of the items.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"

namespace fastmto {
namespace {

// Rows of a Gram that are read where they are; blocks of more would push each other out of the
// caches where the rows stand a power of 2 apart.
constexpr int kInPlace = 16;

// These stay with the calling thread; the threads of a region reach them through references.
thread_local Arena gram_arena, move_arena;
thread_local Tasks gram_tasks, move_tasks;
thread_local std::vector<Item> gram_items;

double clippy_factor(double lr, double largest) {
  const double ratio = lr * largest;
  return ratio > 1 ? 1 / ratio : 1;
}

// Memory of one Gram: for every thread the updates of a block, the Gram's lanes, the largest
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
  Tasks& tasks = gram_tasks;
  std::vector<Item>& items = gram_items;
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
  const Workspace memory(gram_arena, T, pairs, wide, threads, n_items);

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

}  // namespace

void update_gram(const Update& update, const Clip* clip, double* gram) {
  const Blocks& blocks = blocks_for(update);
  const Source updates{blocks.updates[update.kind][static_cast<int>(update.dtype)], false};
  gather(update, clip, blocks, updates, gram, [](std::int64_t, int, const char*) {});
}

void apply_and_gram(const Update& update, const Step& step, double* gram) {
  const Numbers* const rates = first_active(update);
  if (rates == nullptr || skipped(step)) return update_gram(update, nullptr, gram);
  const Blocks& blocks = blocks_for(update);
  const auto dtype = static_cast<int>(update.dtype);
  const Source updates{blocks.updates[update.kind][dtype], false};
  const Move move = move_of(update, step, *rates, move_tasks, move_arena);
  const Factors factors = move.of(0);
  if (update.per_task) {
    const auto function = blocks.apply[update.kind][dtype];
    gather(update, nullptr, blocks, updates, gram, [&](std::int64_t begin, int n, const char*) {
      function(move.rows, factors, step.params, begin, begin + n);
    });
  } else {
    // Without absent tasks the updates of task i stand in row i.
    const auto function = blocks.apply_known[update.kind][dtype];
    const int* index = move_tasks.index.data();
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

}  // namespace fastmto
