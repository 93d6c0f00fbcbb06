// Whole steps over the runs of a plan: the passes of kernels.h one after the other, in one call.
#include <algorithm>

#include "kernels.h"

namespace fastmto {
namespace {

const double kOne = 1.0;

Update update_of(const Plan& plan, const Run& run) {
  Update update;
  update.kind = static_cast<int>(run.kind);
  update.dtype = static_cast<DType>(run.dtype);
  update.per_task = run.per_task != 0;
  update.tasks = run.shared ? plan.rows : 1;
  update.numel = run.numel;
  update.grads = {run.grads, run.stride};
  update.numbers = run.numbers;
  std::copy(run.state, run.state + kMaxStates, update.state);
  update.threads = plan.threads;
  update.isa = Isa::best;
  return update;
}

void search_run(const Plan& plan, const Run& run, const Update& update) {
  if (!plan.clipped) return search(update, nullptr, run.gram);
  const Clip clip{plan.lambda_rel, plan.lambda_abs,
                  run.params,      run.segments,
                  static_cast<int>(run.n_segments), run.sigma};
  search(update, &clip, run.gram);
}

Step step_of(const Plan& plan, const Run& run, const double* weights, const std::int32_t* skip) {
  Step step;
  step.params = run.params;
  step.weights = run.shared ? weights : &kOne;
  step.segments = plan.clipped ? run.segments : nullptr;
  step.n_segments = plan.clipped ? static_cast<int>(run.n_segments) : 0;
  step.sigma = plan.clipped ? run.sigma : nullptr;
  step.skip = skip;
  return step;
}

// gram <- the sum of the Grams of the shared runs that take part.
void add_up(const Plan& plan, double* gram) {
  const int size = plan.rows * plan.rows;
  bool first = true;
  for (int r = 0; r < plan.n_runs; ++r) {
    const Run& run = plan.runs[r];
    if (!plan.takes_part[r] || !run.shared) continue;
    for (int k = 0; k < size; ++k) gram[k] = first ? run.gram[k] : gram[k] + run.gram[k];
    first = false;
  }
}

}  // namespace

bool look(const Plan& plan, const Clock& clock_, bool searches, double* gram) {
  clock(clock_.rows, clock_.hyper, clock_.counts, clock_.active, clock_.numbers, clock_.found);
  for (int r = 0; r < plan.n_runs; ++r) {
    if (!plan.takes_part[r]) continue;
    const Run& run = plan.runs[r];
    const Update update = update_of(plan, run);
    bool finite;
    if (plan.clipped || (searches && run.shared)) {
      search_run(plan, run, update);
      const Matrix matrix{run.gram, update.tasks};
      finite = all_finite(DType::f64, update.tasks, update.tasks, matrix, 1, Isa::best);
    } else {
      finite = all_finite(update.dtype, update.tasks, update.numel, update.grads, plan.threads,
                          Isa::best);
    }
    if (!finite) *clock_.found = 1;
  }
  if (searches) add_up(plan, gram);
  return *clock_.found != 0;
}

void move(const Plan& plan, const Clock& clock_, const double* weights, bool searches,
          double* gram) {
  for (int r = 0; r < plan.n_runs; ++r) {
    if (!plan.takes_part[r]) continue;
    const Run& run = plan.runs[r];
    const Update update = update_of(plan, run);
    const Step step = step_of(plan, run, weights, clock_.found);
    if (!searches || !run.shared) {
      apply(update, step);
    } else if (!plan.clipped) {
      delayed(update, step, run.gram);
    } else {
      // A tensor's factor is known only at its end: two passes.
      search_run(plan, run, update);
      apply(update, step);
    }
  }
  advance(clock_.rows, clock_.counts, clock_.active, clock_.found, clock_.tally);
  if (searches) add_up(plan, gram);
}

}  // namespace fastmto
