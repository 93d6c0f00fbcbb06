// The step of all buffers of an optimizer in one or two calls: fastmto/ops/plan.py says what it is
// for. The passes are those of kernels.h, so every bit is theirs.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fastmto {

// The table of the step counts; `step_constants` and `count_step` in kernels.h.
struct Table {
  int rows;  // R
  const Hyper* hyper;
  std::int64_t* counts;
  Numbers* numbers;
  std::int64_t* tally;
};

// Neighbouring parameters of one rule.
struct Run {
  Update update;  // all its rows of gradients; `threads` is set for every call
  void* params;
  const std::int64_t* segments;  // (n_segments + 1); null without Clippy, as is sigma
  int n_segments;
  double* sigma;
};

// Everything that the pointers show must outlive the plan.
class Plan {
 public:
  // `active` of a head's row says whether it takes part; shared runs do by `rows` of `look`.
  // clip: its bounds are those of every run; null for none. gram: (n, n) for any n up to the
  // shared runs' rows.
  Plan(const Table& table, std::vector<Run> shared, std::vector<Run> heads, const Clip* clip,
       double* gram);

  // Whether `rows` is a number of rows of gradients that every shared run has, or 0.
  bool takes(int rows) const;
  // Elements of gradients.
  std::int64_t work() const { return work_; }

  // Filled by the caller before `look` (R) and before `move` (rows).
  std::vector<std::int32_t> active;
  std::vector<double> weights;
  int rows() const { return rows_; }
  // Whether `look` found a finite step that was not moved yet.
  bool ready() const { return ready_; }

  // Begins the step with `rows` rows of the shared runs; whether it is finite. With `searches`, or
  // Clippy, gram (rows, rows) is written whole: the sum of the shared runs', if there are any.
  bool look(int rows, bool searches, int threads);
  // Moves parameters and moments and counts the step. With `searches`, gram is written on the way.
  void move(bool searches, int threads);

 private:
  Update update_of(const Run& run, int rows, int threads) const;
  void look_at(const Run& run, int rows, bool searches, double* gram, int threads);
  void move_one(const Run& run, int rows, const double* weights, double* gram, int threads);
  double* gram_of(std::size_t shared_run);
  void add_up(std::size_t shared_run);
  bool takes_part(const Run& head) const;

  Table table_;
  std::vector<Run> shared_, heads_;
  bool clipped_;
  Clip clip_{};
  double* gram_;
  std::vector<double> part_;  // the Gram of a run beyond the first
  std::int64_t work_ = 0;
  int rows_ = 0;
  std::int32_t found_ = 0;
  bool ready_ = false;
};

}  // namespace fastmto
