// apply and combine of kernels.h.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tasks.h"

namespace fastmto {
namespace {

// These stay with the calling thread; the threads of a region reach them through references.
thread_local Arena apply_arena;
thread_local Tasks apply_tasks;
thread_local std::vector<Item> apply_items;

}  // namespace

void apply(const Update& update, const Step& step) {
  const Numbers* const rates = first_active(update);
  if (rates == nullptr || skipped(step)) return;
  const Move move = move_of(update, step, *rates, apply_tasks, apply_arena);
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

void combine(DType dtype, int tasks, std::int64_t numel, Matrix grads, const double* weights,
             void* out, int threads, Isa isa) {
  const Update update = without_rule(dtype, tasks, numel, grads, threads, isa);
  Step step{};
  step.weights = weights;
  const Move move = move_of(update, step, *update.numbers, apply_tasks, apply_arena);
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

}  // namespace fastmto
