// The CPU passes over the flat shared parameters: the complete contract.
//
// Semantics: the docstring of fastmto/ops/__init__.py. Pure functions over raw addresses; nothing
// here knows Python or torch, and nothing is checked: the caller has.
//
// Compute type S: double for float64 grads, else float. Sums of the Gram run in float blocks of
// kBlock coordinates (16 lanes, so at most kBlock / 16 terms a lane) and on in double. The items
// that P is cut into depend on P and the segments alone and are combined in their order, so the
// results have the same bits for every number of threads.
#pragma once

#include <cstdint>

namespace fastmto {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kDTypes = 4;
constexpr int kKinds = 6;      // the element formulas of rules.h
constexpr int kMaxStates = 3;  // state tensors of one rule
constexpr int kBlock = 512;    // coordinates whose updates are held in the first-level cache
constexpr int kDrawn = 2048;   // coordinates whose random direction is held there

// Instruction sets. Any two give the same bits, but for v4 with float maths, which has fused
// multiply-adds and estimates of 1/x and 1/sqrt(x) refined by one Newton step.
enum class Isa : int { best = 0, baseline = 1, v3 = 2, v4 = 3 };

// A row of numbers (rules.py): a rule at one step. All 0 for a task that takes no part.
struct Numbers {
  double b1, d1, b2, d2, c1, c2, eps, mu, lr, decay, active;
};

// What numbers are made of where only a tensor holds the step (rules.py).
struct Hyper {
  double b1, b2, eps, mu, corrected, lr, weight_decay;
};

struct Matrix {
  void* data;
  std::int64_t stride;  // elements from one row to the next
};

// What every pass over updates reads.
struct Update {
  int kind;                  // 0 adam 1 adagrad 2 rmsprop 3 +momentum 4 centered 5 both
  DType dtype;               // of grads and params
  bool per_task;             // state (T, P) instead of (P,)
  int tasks;                 // T
  std::int64_t numel;        // P
  Matrix grads;              // (T, P), read only
  const Numbers* numbers;    // T where per_task, else 1
  Matrix state[kMaxStates];  // S; stride unused unless per_task
  int threads;
  Isa isa;
};

// Clippy on the segments of P.
struct Clip {
  double lambda_rel, lambda_abs;
  const void* params;            // (P), dtype of grads
  const std::int64_t* segments;  // (n_segments + 1)
  int n_segments;
  double* sigma;  // (T, n_segments), written whole
};

// One step of parameters and moments.
struct Step {
  void* params;           // (P), dtype of grads, updated
  const double* weights;  // (T)
  const std::int64_t* segments;  // (n_segments + 1), or null when sigma is
  int n_segments;
  const double* sigma;       // (T, n_segments), or null
  const std::int32_t* skip;  // (1) not 0: nothing is written; or null
};

// gram (T, T) written whole. clip may be null.
void update_gram(const Update& update, const Clip* clip, double* gram);

// Moments in update.state and step.params are updated in place.
void apply(const Update& update, const Step& step);

// update_gram, then apply with step.weights, in one pass; step.sigma is null. (With Clippy a
// tensor's sigma is known only at its end: that is two passes.) The results have the bits of both
// called one after the other. gram is written under step.skip too.
void apply_and_gram(const Update& update, const Step& step, double* gram);

// gram (T, T) written whole: inner products of the gradients themselves.
void gram(DType dtype, int tasks, std::int64_t numel, Matrix grads, double* gram, int threads,
          Isa isa);

// out (P), dtype of grads; it may be one of the rows of grads, but not overlap two.
void combine(DType dtype, int tasks, std::int64_t numel, Matrix grads, const double* weights,
             void* out, int threads, Isa isa);

enum class Draw : int { given = 0, gaussian = 1, rademacher = 2 };

// Rows that each lie along a direction from the parameters.
struct Perturbation {
  DType dtype;  // f32 or f64
  int rows;     // R
  std::int64_t numel;
  const void* params;    // (P)
  Matrix out;            // (R, P), written whole; may be params where R = 1
  const double* scale;   // (R)
  Draw draw;
  Matrix direction;      // given: (R, P), or one for all with stride 0
  std::uint64_t seed;    // drawn: row r lies along direction offset + r of this seed
  std::uint64_t offset;
  int threads;
  Isa isa;
};

// out_r = params + scale_r direction_r. Every instruction set gives the same bits.
void perturb(const Perturbation& what);

// Whether none of rows x numel elements is NaN, infinite, or 2^63 (2^511 for f64) or larger in size,
// so that all have squares in the compute type.
bool all_finite(DType dtype, std::int64_t rows, std::int64_t numel, Matrix values, int threads,
                Isa isa);

// numbers (rows) of hyper at step counts + 1 where active, else 0; found (1) is set to 0. The bits
// are those of fastmto.optim.rules.Rule.numbers.
void step_constants(int rows, const Hyper* hyper, const std::int64_t* counts,
                    const std::int32_t* active, Numbers* numbers, std::int32_t* found);

// Where found (1) is 0, counts of the active rows and tally[0] grow by 1, else tally[1].
void count_step(int rows, std::int64_t* counts, const std::int32_t* active,
                const std::int32_t* found, std::int64_t* tally);

// Whether this machine and this build have `isa`.
bool supported(Isa isa);

}  // namespace fastmto
