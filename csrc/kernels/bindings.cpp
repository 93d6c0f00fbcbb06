// The module of the kernels. These bindings and bindings_plan.cpp alone know Python.
#include "arguments.h"

#include <cstdint>

namespace fastmto {

// The type of plan.h, new; bindings_plan.cpp.
PyObject* plan_type();

}  // namespace fastmto

namespace {

using namespace fastmto;

PyObject* py_update_gram(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Update update = update_of(from);
  double* gram = from.address<double>();
  if (!from.complete()) return nullptr;
  return answer(update.numel * update.tasks, [&] { update_gram(update, nullptr, gram); });
}

PyObject* py_update_gram_clipped(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Update update = update_of(from);
  double* gram = from.address<double>();
  Clip clip;
  clip.lambda_rel = from.real();
  clip.lambda_abs = from.real();
  clip.params = from.address<const void>();
  clip.segments = from.address<const std::int64_t>();
  clip.n_segments = from.small();
  clip.sigma = from.address<double>();
  if (!from.complete()) return nullptr;
  return answer(update.numel * update.tasks, [&] { update_gram(update, &clip, gram); });
}

PyObject* py_apply(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Update update = update_of(from);
  Step step;
  step.params = from.address<void>();
  step.weights = from.address<const double>();
  step.skip = from.address<const std::int32_t>();
  step.segments = from.address<const std::int64_t>();
  step.n_segments = from.small();
  step.sigma = from.address<const double>();
  if (!from.complete()) return nullptr;
  return answer(update.numel * update.tasks, [&] { apply(update, step); });
}

PyObject* py_apply_and_gram(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Update update = update_of(from);
  Step step{};
  step.params = from.address<void>();
  step.weights = from.address<const double>();
  step.skip = from.address<const std::int32_t>();
  double* gram = from.address<double>();
  if (!from.complete()) return nullptr;
  return answer(update.numel * update.tasks, [&] { apply_and_gram(update, step, gram); });
}

PyObject* py_gram(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const auto dtype = static_cast<DType>(from.small());
  const int tasks = from.small();
  const std::int64_t numel = from.integer();
  Matrix grads;
  grads.data = from.address<void>();
  grads.stride = from.integer();
  double* out = from.address<double>();
  const int threads = from.small();
  const auto isa = static_cast<Isa>(from.small());
  if (!from.complete()) return nullptr;
  return answer(numel * tasks, [&] { gram(dtype, tasks, numel, grads, out, threads, isa); });
}

PyObject* py_combine(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const auto dtype = static_cast<DType>(from.small());
  const int tasks = from.small();
  const std::int64_t numel = from.integer();
  Matrix grads;
  grads.data = from.address<void>();
  grads.stride = from.integer();
  const double* weights = from.address<const double>();
  void* out = from.address<void>();
  const int threads = from.small();
  const auto isa = static_cast<Isa>(from.small());
  if (!from.complete()) return nullptr;
  return answer(numel * tasks,
                [&] { combine(dtype, tasks, numel, grads, weights, out, threads, isa); });
}

PyObject* py_perturb(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  Perturbation what;
  what.dtype = static_cast<DType>(from.small());
  what.rows = from.small();
  what.numel = from.integer();
  what.params = from.address<const void>();
  what.out.data = from.address<void>();
  what.out.stride = from.integer();
  what.scale = from.address<const double>();
  what.draw = static_cast<Draw>(from.small());
  what.direction.data = from.address<void>();
  what.direction.stride = from.integer();
  what.seed = from.natural();
  what.offset = from.natural();
  what.threads = from.small();
  what.isa = static_cast<Isa>(from.small());
  if (!from.complete()) return nullptr;
  return answer(what.numel * what.rows, [&] { perturb(what); });
}

PyObject* py_all_finite(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const auto dtype = static_cast<DType>(from.small());
  const std::int64_t rows = from.integer();
  const std::int64_t numel = from.integer();
  Matrix matrix;
  matrix.data = from.address<void>();
  matrix.stride = from.integer();
  const int threads = from.small();
  const auto isa = static_cast<Isa>(from.small());
  if (!from.complete()) return nullptr;
  bool finite = false;
  const auto body = [&] { finite = all_finite(dtype, rows, numel, matrix, threads, isa); };
  return done(rows * numel, body) ? PyBool_FromLong(finite) : nullptr;
}

PyObject* py_step_constants(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const int rows = from.small();
  const auto* hyper = from.address<const Hyper>();
  const auto* counts = from.address<const std::int64_t>();
  const auto* active = from.address<const std::int32_t>();
  auto* numbers = from.address<Numbers>();
  auto* found = from.address<std::int32_t>();
  if (!from.complete()) return nullptr;
  return answer(rows, [&] { step_constants(rows, hyper, counts, active, numbers, found); });
}

PyObject* py_count_step(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const int rows = from.small();
  auto* counts = from.address<std::int64_t>();
  const auto* active = from.address<const std::int32_t>();
  const auto* found = from.address<const std::int32_t>();
  auto* tally = from.address<std::int64_t>();
  if (!from.complete()) return nullptr;
  return answer(rows, [&] { count_step(rows, counts, active, found, tally); });
}

PyObject* py_supported(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const auto isa = static_cast<Isa>(from.small());
  if (!from.complete()) return nullptr;
  return PyBool_FromLong(supported(isa));
}

PyMethodDef methods[] = {
    method<py_update_gram>("update_gram"),
    method<py_update_gram_clipped>("update_gram_clipped"),
    method<py_apply>("apply"),
    method<py_apply_and_gram>("apply_and_gram"),
    method<py_gram>("gram"),
    method<py_combine>("combine"),
    method<py_perturb>("perturb"),
    method<py_all_finite>("all_finite"),
    method<py_step_constants>("step_constants"),
    method<py_count_step>("count_step"),
    method<py_supported>("supported"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_kernels",
                      "CPU kernels of fastmto.ops; csrc/kernels/kernels.h is the contract.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
  PyObject* made = PyModule_Create(&module);
  PyObject* type = made == nullptr ? nullptr : fastmto::plan_type();
  if (type == nullptr || PyModule_AddObject(made, "Plan", type) != 0) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
