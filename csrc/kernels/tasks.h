// The tasks that take part in a pass over updates, with their rows and factors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "kernels.h"
#include "work.h"

namespace fastmto {

// The table of an instruction set.
const Blocks& blocks_of(Isa isa);

// The estimates of v4 clamp roots to about 1e-19, which an ordinary eps hides.
inline const Blocks& blocks_for(const Update& update) {
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

// The first active row of numbers, whose rates are those of the step; null where no task takes part.
inline const Numbers* first_active(const Update& update) {
  const int owners = update.per_task ? update.tasks : 1;
  for (int i = 0; i < owners; ++i) {
    if (update.numbers[i].active != 0) return update.numbers + i;
  }
  return nullptr;
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

inline bool skipped(const Step& step) { return step.skip != nullptr && *step.skip != 0; }

// For passes over the gradients as they are.
inline Update without_rule(DType dtype, int tasks, std::int64_t numel, Matrix grads,
                            int threads, Isa isa) {
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

// `rates`: the first active row. The move shows the memory of tasks and arena.
inline Move move_of(const Update& update, const Step& step, const Numbers& rates, Tasks& tasks,
                    Arena& arena) {
  tasks.fill(update, [&](int i) { return update.per_task || step.weights[i] != 0; });
  const int sets = step.sigma != nullptr ? step.n_segments : 1;
  const int size = compute_size(update.dtype);
  char* factors = arena.take(std::size_t(size) * tasks.rows.tasks * (sets + 1));
  if (size == 8) {
    fill_factors<double>(step, rates.lr, tasks.index, sets, factors);
  } else {
    fill_factors<float>(step, rates.lr, tasks.index, sets, factors);
  }
  return {tasks.rows, factors, size, sets, rates.decay, !update.per_task};
}

}  // namespace fastmto
