// The only file of the kernels that knows Python. Arguments come in as plain numbers and addresses;
// fastmto/ops/cpu.py has checked what they point to. Plain C-API functions on vectors of arguments:
// with twenty of them, pybind11's dispatch would cost as much as a small tensor's whole step.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "kernels.h"
#include "plan.h"

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

  PyObject* next() {
    PyObject* value = at_ < count_ ? values_[at_] : nullptr;
    ++at_;
    return value;
  }

  bool complete() const {
    if (PyErr_Occurred() != nullptr) return false;
    if (at_ == count_) return true;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", at_, count_);
    return false;
  }

 private:
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

// Runs body, for large `work` without the lock; false with Python's error set if memory ran out.
template <class Body>
bool done(std::int64_t work, const Body& body) {
  PyThreadState* released = work < kRelease ? nullptr : PyEval_SaveThread();
  bool enough_memory = true;
  try {
    body();
  } catch (const std::bad_alloc&) {
    enough_memory = false;
  }
  if (released != nullptr) PyEval_RestoreThread(released);
  if (!enough_memory) PyErr_NoMemory();
  return enough_memory;
}

template <class Body>
PyObject* answer(std::int64_t work, const Body& body) {
  if (!done(work, body)) return nullptr;
  Py_RETURN_NONE;
}

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

struct PyPlan {
  PyObject_HEAD
  Plan* plan;
};

// A tuple's items, or null with an error set.
PyObject* const* items_of(PyObject* tuple, Py_ssize_t* count) {
  if (tuple == nullptr || !PyTuple_Check(tuple)) {
    PyErr_SetString(PyExc_TypeError, "expected a tuple");
    return nullptr;
  }
  *count = PyTuple_GET_SIZE(tuple);
  return reinterpret_cast<PyTupleObject*>(tuple)->ob_item;
}

// A tuple of runs, each a tuple of numbers. False with an error set.
bool runs_of(PyObject* tuple, std::vector<Run>& runs) {
  Py_ssize_t n = 0;
  PyObject* const* items = items_of(tuple, &n);
  for (Py_ssize_t k = 0; items != nullptr && k < n; ++k) {
    Py_ssize_t count = 0;
    PyObject* const* values = items_of(items[k], &count);
    if (values == nullptr) return false;
    Arguments from(values, count);
    Run run;
    run.update = update_of(from);
    run.params = from.address<void>();
    run.segments = from.address<const std::int64_t>();
    run.n_segments = from.small();
    run.sigma = from.address<double>();
    if (!from.complete()) return false;
    runs.push_back(run);
  }
  return items != nullptr;
}

PyObject* plan_new(PyTypeObject* type, PyObject* args, PyObject*) {
  Py_ssize_t count = 0;
  PyObject* const* values = items_of(args, &count);
  constexpr Py_ssize_t numbers = 9;
  if (count != numbers + 2) {
    return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", numbers + 2, count);
  }
  Arguments from(values, numbers);
  Table table;
  table.rows = from.small();
  table.hyper = from.address<const Hyper>();
  table.counts = from.address<std::int64_t>();
  table.numbers = from.address<Numbers>();
  table.tally = from.address<std::int64_t>();
  double* gram = from.address<double>();
  const bool clipped = from.integer() != 0;
  Clip clip{};
  clip.lambda_rel = from.real();
  clip.lambda_abs = from.real();
  std::vector<Run> shared, heads;
  if (!from.complete() || !runs_of(values[numbers], shared) ||
      !runs_of(values[numbers + 1], heads)) {
    return nullptr;
  }
  auto* self = reinterpret_cast<PyPlan*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  const Clip* given = clipped ? &clip : nullptr;
  const bool made = done(0, [&] {
    self->plan = new Plan(table, std::move(shared), std::move(heads), given, gram);
  });
  if (made) return reinterpret_cast<PyObject*>(self);
  Py_DECREF(self);
  return nullptr;
}

void plan_free(PyObject* self) {
  delete reinterpret_cast<PyPlan*>(self)->plan;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

// body(place, item) for the `expected` items of a list or tuple. False with an error set.
template <class Body>
bool read(PyObject* sequence, const char* name, std::size_t expected, const Body& body) {
  if (!(PyList_Check(sequence) || PyTuple_Check(sequence)) ||
      static_cast<std::size_t>(PySequence_Fast_GET_SIZE(sequence)) != expected) {
    PyErr_Format(PyExc_ValueError, "%s must be a list or tuple of length %zu, got %R", name,
                 expected, sequence);
    return false;
  }
  PyObject** items = PySequence_Fast_ITEMS(sequence);
  for (std::size_t k = 0; k < expected; ++k) {
    body(k, items[k]);
    if (PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

bool read_weights(PyObject* sequence, Plan& plan, int rows) {
  plan.weights.resize(rows);
  return read(sequence, "weights", rows,
              [&](std::size_t k, PyObject* item) { plan.weights[k] = PyFloat_AsDouble(item); });
}

bool read_rows(PyObject* sequence, Plan& plan, int rows) {
  if (!plan.takes(rows)) {
    PyErr_Format(PyExc_ValueError,
                 "rows must be 0 or a number of rows that all shared entries have (all of theirs "
                 "where every task keeps its own moments), got %d",
                 rows);
    return false;
  }
  return read(sequence, "active", plan.active.size(), [&](std::size_t k, PyObject* item) {
    plan.active[k] = PyObject_IsTrue(item);
  });
}

PyObject* plan_look(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  Plan& plan = *reinterpret_cast<PyPlan*>(self)->plan;
  Arguments from(values, count);
  const int rows = from.small();
  PyObject* active = from.next();
  const bool searches = from.integer() != 0;
  const int threads = from.small();
  if (!from.complete() || !read_rows(active, plan, rows)) return nullptr;
  bool finite = false;
  const auto body = [&] { finite = plan.look(rows, searches, threads); };
  return done(plan.work(), body) ? PyBool_FromLong(!finite) : nullptr;
}

PyObject* plan_move(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  Plan& plan = *reinterpret_cast<PyPlan*>(self)->plan;
  Arguments from(values, count);
  PyObject* weights = from.next();
  const bool searches = from.integer() != 0;
  const int threads = from.small();
  if (!from.complete() || !read_weights(weights, plan, plan.rows())) return nullptr;
  if (!plan.ready()) {
    PyErr_SetString(PyExc_RuntimeError, "move() needs a look() before it that found nothing");
    return nullptr;
  }
  return answer(plan.work(), [&] { plan.move(searches, threads); });
}

PyObject* plan_step(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  Plan& plan = *reinterpret_cast<PyPlan*>(self)->plan;
  Arguments from(values, count);
  const int rows = from.small();
  PyObject* active = from.next();
  PyObject* weights = from.next();
  const bool searches = from.integer() != 0;
  const int threads = from.small();
  if (!from.complete() || !read_rows(active, plan, rows) || !read_weights(weights, plan, rows)) {
    return nullptr;
  }
  bool finite = false;
  const auto body = [&] {
    finite = plan.look(rows, false, threads);
    if (finite) plan.move(searches, threads);
  };
  return done(plan.work(), body) ? PyBool_FromLong(!finite) : nullptr;
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  // The C API stores every calling convention in one pointer type and tells them apart by flag.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<py_update_gram>("update_gram"),         method<py_update_gram_clipped>("update_gram_clipped"),
    method<py_apply>("apply"),           method<py_apply_and_gram>("apply_and_gram"),
    method<py_gram>("gram"),             method<py_combine>("combine"),
    method<py_perturb>("perturb"),       method<py_all_finite>("all_finite"),
    method<py_step_constants>("step_constants"),           method<py_count_step>("count_step"),
    method<py_supported>("supported"),   {nullptr, nullptr, 0, nullptr},
};

PyMethodDef plan_methods[] = {
    method<plan_look>("look"),
    method<plan_move>("move"),
    method<plan_step>("step"),
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot plan_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(plan_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(plan_free)},
    {Py_tp_methods, plan_methods},
    {0, nullptr},
};

PyType_Spec plan_spec = {"fastmto.ops._kernels.Plan", sizeof(PyPlan), 0, Py_TPFLAGS_DEFAULT,
                         plan_slots};

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
  PyObject* type = made == nullptr ? nullptr : PyType_FromSpec(&plan_spec);
  if (type == nullptr || PyModule_AddObject(made, "Plan", type) != 0) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
