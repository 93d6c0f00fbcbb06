// What an instruction set has to offer: loops over one short range, without threads or memory of
// their own. isa_*.cpp compile loops.h once each into such a table, which the passes call.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace fastmto {

// Rows for one range of coordinates; all pointers are to coordinate 0 of P.
struct Rows {
  int tasks;
  const void* const* grads;          // tasks
  void* const* state;                // state k of task t at [k * owners + t]
  int owners;                        // tasks with moments of their own: tasks, or 1
  const Numbers* numbers;            // owners
};

// Factors of one step. S arrays, one entry a task of Rows.
struct Factors {
  const void* update;  // lr weights_i sigma_i; 0 leaves the task out
  const void* grad;    // weights_i, for shared moments
  double decay;        // the part that weight decay takes
};

struct Blocks {
  // u[t * kBlock + j] = update of task t at coordinate begin + j, j < n <= kBlock; zeros from n
  // to the next multiple of 32. S.
  void (*updates[kKinds][kDTypes])(const Rows& rows, std::int64_t begin, int n, void* u);

  // The same with the gradients for updates; numbers and state are not looked at.
  void (*gradients[kDTypes])(const Rows& rows, std::int64_t begin, int n, void* u);

  // largest[t * 16 + lane] = max with |u| / (lambda_rel |params| + lambda_abs). S.
  void (*excess[kDTypes])(const void* u, int tasks, const void* params, std::int64_t begin, int n,
                          double lambda_rel, double lambda_abs, void* largest);

  // lanes[pair * 8 + lane] += u_i u_j over the block, pairs i <= j row by row; rows of u are `stride`
  // apart. [0] S = float.
  void (*gram[2])(const void* u, std::int64_t stride, int tasks, int n, double* lanes);

  // params and moments on [begin, end). u, where given (shared state only, end - begin <= kBlock),
  // holds the updates of task t at row u_rows[t].
  void (*apply[kKinds][kDTypes])(const Rows& rows, const Factors& factors, void* params,
                                 std::int64_t begin, std::int64_t end);
  void (*apply_known[kKinds][kDTypes])(const Rows& rows, const Factors& factors, void* params,
                                       std::int64_t begin, std::int64_t end, const void* u,
                                       const int* u_rows);

  // out[j] = sum_t weights[t] grads[t][j] on [begin, end); weights S. `stream`, for float and
  // double: write past the caches; out is aligned to 64 bytes, and the caller has the last word
  // with the processor (sfence).
  void (*combine[kDTypes])(const void* const* grads, int tasks, const void* weights, void* out,
                           std::int64_t begin, std::int64_t end, bool stream);

  // u[j] of direction `number` at coordinate begin + j, j < n <= kDrawn; begin a multiple of
  // kDrawn. u has room for kDrawn. [0] gaussian, [1] Rademacher.
  void (*draw[2])(std::uint64_t seed, std::uint64_t number, std::int64_t begin, int n, float* u);

  // out[j] = params[j] + scale direction[j], j < n; `stream` as in combine. [0] float, [1] double,
  // [2] double with a drawn direction, which is float.
  void (*shift[3])(const void* params, const void* direction, double scale, void* out, int n,
                   bool stream);

  bool (*finite[kDTypes])(const void* values, std::int64_t n);
};

extern const Blocks blocks_baseline;
extern const Blocks blocks_v3;
extern const Blocks blocks_v4;

}  // namespace fastmto
