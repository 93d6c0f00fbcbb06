// The only file of the kernels that knows Python. Arguments come in as plain numbers and addresses;
// fastmto/ops/cpu.py has checked what they point to. Plain C-API functions on vectors of arguments:
// with twenty of them, pybind11's dispatch would cost as much as a small tensor's whole step.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>

#include "kernels.h"

namespace {

using namespace fastmto;

// Elements from which on letting other Python threads run is worth the two locks.
constexpr std::int64_t kRelease = 1 << 14;

// Takes the arguments one after the other. A wrong type or number sets a Python error, which
// `complete` reports before anything is used.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}

  std::int64_t integer() {
    PyObject* value = next();
    return value == nullptr ? 0 : PyLong_AsLongLong(value);
  }
  std::uint64_t natural() {
    PyObject* value = next();
    return value == nullptr ? 0 : PyLong_AsUnsignedLongLong(value);
  }
  int small() { return static_cast<int>(integer()); }
  double real() {
    PyObject* value = next();
    return value == nullptr ? 0 : PyFloat_AsDouble(value);
  }
  template <class D>
  D* address() {
    PyObject* value = next();
    return value == nullptr ? nullptr : static_cast<D*>(PyLong_AsVoidPtr(value));
  }

  bool complete() const {
    if (PyErr_Occurred() != nullptr) return false;
    if (at_ == count_) return true;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", at_, count_);
    return false;
  }

 private:
  PyObject* next() {
    PyObject* value = at_ < count_ ? values_[at_] : nullptr;
    ++at_;
    return value;
  }

  PyObject* const* values_;
  Py_ssize_t count_, at_ = 0;
};

// The arguments that search, apply and delayed share.
Update update_of(Arguments& from) {
  Update update;
  update.kind = from.small();
  update.dtype = static_cast<DType>(from.small());
  update.per_task = from.integer() != 0;
  update.tasks = from.small();
  update.numel = from.integer();
  update.grads.data = from.address<void>();
  update.grads.stride = from.integer();
  update.numbers = from.address<const Numbers>();
  for (Matrix& moments : update.state) {
    moments.data = from.address<void>();
    moments.stride = from.integer();
  }
  update.threads = from.small();
  update.isa = static_cast<Isa>(from.small());
  return update;
}

// Runs body and turns it into Python's answer.
template <class Body>
PyObject* answer(std::int64_t work, const Body& body) {
  PyThreadState* released = work < kRelease ? nullptr : PyEval_SaveThread();
  bool enough_memory = true;
  try {
    body();
  } catch (const std::bad_alloc&) {
    enough_memory = false;
  }
  if (released != nullptr) PyEval_RestoreThread(released);
  if (!enough_memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* py_search(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Update update = update_of(from);
  double* gram = from.address<double>();
  if (!from.complete()) return nullptr;
  return answer(update.numel * update.tasks, [&] { search(update, nullptr, gram); });
}

PyObject* py_search_clipped(PyObject*, PyObject* const* values, Py_ssize_t count) {
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
  return answer(update.numel * update.tasks, [&] { search(update, &clip, gram); });
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

PyObject* py_delayed(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Update update = update_of(from);
  Step step{};
  step.params = from.address<void>();
  step.weights = from.address<const double>();
  step.skip = from.address<const std::int32_t>();
  double* gram = from.address<double>();
  if (!from.complete()) return nullptr;
  return answer(update.numel * update.tasks, [&] { delayed(update, step, gram); });
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

PyObject* py_check(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const auto dtype = static_cast<DType>(from.small());
  const std::int64_t rows = from.integer();
  const std::int64_t numel = from.integer();
  Matrix matrix;
  matrix.data = from.address<void>();
  matrix.stride = from.integer();
  const int threads = from.small();
  const auto isa = static_cast<Isa>(from.small());
  auto* found = from.address<std::int32_t>();
  if (!from.complete()) return nullptr;
  return answer(rows * numel, [&] {
    if (!all_finite(dtype, rows, numel, matrix, threads, isa)) *found = 1;
  });
}

PyObject* py_clock(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const int rows = from.small();
  const auto* hyper = from.address<const Hyper>();
  const auto* counts = from.address<const std::int64_t>();
  const auto* active = from.address<const std::int32_t>();
  auto* numbers = from.address<Numbers>();
  auto* found = from.address<std::int32_t>();
  if (!from.complete()) return nullptr;
  return answer(rows, [&] { clock(rows, hyper, counts, active, numbers, found); });
}

PyObject* py_advance(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const int rows = from.small();
  auto* counts = from.address<std::int64_t>();
  const auto* active = from.address<const std::int32_t>();
  const auto* found = from.address<const std::int32_t>();
  auto* tally = from.address<std::int64_t>();
  if (!from.complete()) return nullptr;
  return answer(rows, [&] { advance(rows, counts, active, found, tally); });
}

// What look and move share.
Plan plan_of(Arguments& from) {
  Plan plan;
  plan.runs = from.address<const Run>();
  plan.takes_part = from.address<const char>();
  plan.n_runs = from.small();
  plan.rows = from.small();
  plan.clipped = from.integer() != 0;
  plan.lambda_rel = from.real();
  plan.lambda_abs = from.real();
  plan.threads = from.small();
  return plan;
}

Clock clock_of(Arguments& from) {
  Clock clock;
  clock.rows = from.small();
  clock.hyper = from.address<const Hyper>();
  clock.counts = from.address<std::int64_t>();
  clock.active = from.address<const std::int32_t>();
  clock.numbers = from.address<Numbers>();
  clock.found = from.address<std::int32_t>();
  clock.tally = from.address<std::int64_t>();
  return clock;
}

// Elements that a plan's passes read.
std::int64_t work_of(const Plan& plan) {
  std::int64_t work = 0;
  for (int r = 0; r < plan.n_runs; ++r) {
    const Run& run = plan.runs[r];
    if (plan.takes_part[r]) work += run.numel * (run.shared ? plan.rows : 1);
  }
  return work;
}

PyObject* py_look(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Plan plan = plan_of(from);
  const Clock clock = clock_of(from);
  const bool searches = from.integer() != 0;
  double* gram = from.address<double>();
  if (!from.complete()) return nullptr;
  bool found = false;
  PyObject* none = answer(work_of(plan), [&] { found = look(plan, clock, searches, gram); });
  if (none == nullptr) return nullptr;
  Py_DECREF(none);
  return PyBool_FromLong(found);
}

PyObject* py_move(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const Plan plan = plan_of(from);
  const Clock clock = clock_of(from);
  const auto* weights = from.address<const double>();
  const bool searches = from.integer() != 0;
  double* gram = from.address<double>();
  if (!from.complete()) return nullptr;
  return answer(work_of(plan), [&] { move(plan, clock, weights, searches, gram); });
}

PyObject* py_supported(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments from(values, count);
  const auto isa = static_cast<Isa>(from.small());
  if (!from.complete()) return nullptr;
  return PyBool_FromLong(supported(isa));
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  // The C API stores every calling convention in one pointer type and tells them apart by flag.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<py_search>("search"),         method<py_search_clipped>("search_clipped"),
    method<py_apply>("apply"),           method<py_delayed>("delayed"),
    method<py_gram>("gram"),             method<py_combine>("combine"),
    method<py_perturb>("perturb"),       method<py_check>("check"),
    method<py_clock>("clock"),           method<py_advance>("advance"),
    method<py_look>("look"),             method<py_move>("move"),
    method<py_supported>("supported"),   {nullptr, nullptr, 0, nullptr},
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

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
