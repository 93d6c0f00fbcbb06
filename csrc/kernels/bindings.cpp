// The only file of the kernels that knows Python. Addresses come in as integers; fastmto/ops/cpu.py
// has checked what they point to.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string_view>

#include "kernels.h"

namespace py = pybind11;
using namespace fastmto;

namespace {

using Address = std::uintptr_t;

// Elements from which on letting other Python threads run is worth the two locks.
constexpr std::int64_t kRelease = 1 << 14;

template <class Body>
auto without_gil(std::int64_t work, const Body& body) {
  if (work < kRelease) return body();
  const py::gil_scoped_release release;
  return body();
}

template <class D>
D* at(Address address) {
  return reinterpret_cast<D*>(address);
}

// The arguments that search, apply and delayed share.
Update update_of(int kind, int dtype, bool per_task, int tasks, std::int64_t numel, Address grads,
                 std::int64_t grads_stride, std::string_view coefficients, Address state_0,
                 std::int64_t stride_0, Address state_1, std::int64_t stride_1, Address state_2,
                 std::int64_t stride_2, int threads, int isa) {
  return {kind,
          static_cast<DType>(dtype),
          per_task,
          tasks,
          numel,
          {at<void>(grads), grads_stride},
          reinterpret_cast<const Coefficients*>(coefficients.data()),
          {{at<void>(state_0), stride_0}, {at<void>(state_1), stride_1},
           {at<void>(state_2), stride_2}},
          threads,
          static_cast<Isa>(isa)};
}

}  // namespace

#define UPDATE_PARAMETERS                                                                     \
  int kind, int dtype, bool per_task, int tasks, std::int64_t numel, Address grads,           \
      std::int64_t grads_stride, std::string_view coefficients, Address state_0,              \
      std::int64_t stride_0, Address state_1, std::int64_t stride_1, Address state_2,         \
      std::int64_t stride_2, int threads, int isa
#define UPDATE                                                                                  \
  update_of(kind, dtype, per_task, tasks, numel, grads, grads_stride, coefficients, state_0,    \
            stride_0, state_1, stride_1, state_2, stride_2, threads, isa)

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "CPU kernels of fastmto.ops (csrc/kernels/kernels.h is the contract).";

  m.def("search", [](UPDATE_PARAMETERS, Address gram) {
    const Update update = UPDATE;
    without_gil(numel * tasks, [&] { search(update, nullptr, at<double>(gram)); });
  });

  m.def("search_clipped",
        [](UPDATE_PARAMETERS, Address gram, double lambda_rel, double lambda_abs, double lr,
           Address params, Address segments, int n_segments, Address sigma) {
          const Update update = UPDATE;
          const Clip clip{lambda_rel, lambda_abs, lr,
                          at<const void>(params), at<const std::int64_t>(segments), n_segments,
                          at<double>(sigma)};
          without_gil(numel * tasks, [&] { search(update, &clip, at<double>(gram)); });
        });

  m.def("apply",
        [](UPDATE_PARAMETERS, Address params, Address weights, double lr, double weight_decay,
           Address segments, int n_segments, Address sigma) {
          const Update update = UPDATE;
          const Step step{at<void>(params), at<const double>(weights), lr, weight_decay,
                          at<const std::int64_t>(segments), n_segments, at<const double>(sigma)};
          without_gil(numel * tasks, [&] { apply(update, step); });
        });

  m.def("delayed", [](UPDATE_PARAMETERS, Address params, Address weights, double lr,
                      double weight_decay, Address gram) {
    const Update update = UPDATE;
    const Step step{at<void>(params), at<const double>(weights), lr, weight_decay, nullptr, 0,
                    nullptr};
    without_gil(numel * tasks, [&] { delayed(update, step, at<double>(gram)); });
  });

  m.def("combine", [](int dtype, int tasks, std::int64_t numel, Address grads,
                      std::int64_t grads_stride, Address weights, Address out, int threads,
                      int isa) {
    without_gil(numel * tasks, [&] {
      combine(static_cast<DType>(dtype), tasks, numel, {at<void>(grads), grads_stride},
              at<const double>(weights), at<void>(out), threads, static_cast<Isa>(isa));
    });
  });

  m.def("all_finite", [](int dtype, std::int64_t rows, std::int64_t numel, Address values,
                         std::int64_t stride, int threads, int isa) {
    return without_gil(rows * numel, [&] {
      return all_finite(static_cast<DType>(dtype), rows, numel, {at<void>(values), stride},
                        threads, static_cast<Isa>(isa));
    });
  });

  m.def("supported", [](int isa) { return supported(static_cast<Isa>(isa)); });
}
