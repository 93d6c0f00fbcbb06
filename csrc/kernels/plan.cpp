#include "plan.h"

#include <algorithm>
#include <utility>

namespace fastmto {

Plan::Plan(const Table& table, std::vector<Run> shared, std::vector<Run> heads, const Clip* clip,
           double* gram)
    : active(table.rows),
      table_(table),
      shared_(std::move(shared)),
      heads_(std::move(heads)),
      clipped_(clip != nullptr),
      gram_(gram) {
  if (clipped_) clip_ = *clip;
  std::size_t most = 1;
  for (const Run& run : shared_) most = std::max<std::size_t>(most, run.update.tasks);
  part_.resize(most * most);
  weights.reserve(most);
  for (const auto* runs : {&shared_, &heads_}) {
    for (const Run& run : *runs) work_ += run.update.numel * run.update.tasks;
  }
}

bool Plan::takes(int rows) const {
  return rows == 0 || (rows > 0 && std::all_of(shared_.begin(), shared_.end(), [&](const Run& run) {
           return run.update.per_task ? rows == run.update.tasks : rows <= run.update.tasks;
         }));
}

Update Plan::update_of(const Run& run, int rows, int threads) const {
  Update update = run.update;
  update.tasks = rows;
  update.threads = threads;
  return update;
}

bool Plan::takes_part(const Run& head) const {
  return active[head.update.numbers - table_.numbers] != 0;
}

double* Plan::gram_of(std::size_t shared_run) { return shared_run == 0 ? gram_ : part_.data(); }

void Plan::add_up(std::size_t shared_run) {
  if (shared_run == 0) return;
  for (int k = 0; k < rows_ * rows_; ++k) gram_[k] += part_[k];
}

void Plan::look_at(const Run& run, int rows, bool searches, double* gram, int threads) {
  const Update update = update_of(run, rows, threads);
  bool finite;
  if (searches || clipped_) {
    Clip clip = clip_;
    clip.params = run.params;
    clip.segments = run.segments;
    clip.n_segments = run.n_segments;
    clip.sigma = run.sigma;
    update_gram(update, clipped_ ? &clip : nullptr, gram);
    finite = all_finite(DType::f64, rows, rows, {gram, rows}, threads, update.isa);
  } else {
    finite = all_finite(update.dtype, rows, update.numel, update.grads, threads, update.isa);
  }
  if (!finite) found_ = 1;
}

bool Plan::look(int rows, bool searches, int threads) {
  rows_ = rows;
  step_constants(table_.rows, table_.hyper, table_.counts, active.data(), table_.numbers, &found_);
  for (std::size_t k = 0; rows > 0 && k < shared_.size(); ++k) {
    look_at(shared_[k], rows, searches, gram_of(k), threads);
    if (searches || clipped_) add_up(k);
  }
  for (const Run& run : heads_) {
    if (takes_part(run)) look_at(run, 1, false, part_.data(), threads);
  }
  ready_ = found_ == 0;
  return ready_;
}

// gram: null for a move alone.
void Plan::move_one(const Run& run, int rows, const double* weights, double* gram, int threads) {
  const Update update = update_of(run, rows, threads);
  Step step{};
  step.params = run.params;
  step.weights = weights;
  if (clipped_) {
    step.segments = run.segments;
    step.n_segments = run.n_segments;
    step.sigma = run.sigma;
  }
  if (gram != nullptr) {
    apply_and_gram(update, step, gram);
  } else {
    apply(update, step);
  }
}

void Plan::move(bool searches, int threads) {
  // With Clippy `look` has made the Gram of this step already.
  const bool gathers = searches && !clipped_;
  for (std::size_t k = 0; rows_ > 0 && k < shared_.size(); ++k) {
    move_one(shared_[k], rows_, weights.data(), gathers ? gram_of(k) : nullptr, threads);
    if (gathers) add_up(k);
  }
  constexpr double one = 1;
  for (const Run& run : heads_) {
    if (takes_part(run)) move_one(run, 1, &one, nullptr, threads);
  }
  count_step(table_.rows, table_.counts, active.data(), &found_, table_.tally);
  ready_ = false;
}

}  // namespace fastmto
