// The Python type of plan.h.
#include "arguments.h"

#include <utility>
#include <vector>

#include "plan.h"

namespace fastmto {
namespace {

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

bool read_weights(PyObject* sequence, Plan& plan) {
  plan.weights.resize(plan.rows());
  return read(sequence, "weights", plan.weights.size(),
              [&](std::size_t k, PyObject* item) { plan.weights[k] = PyFloat_AsDouble(item); });
}

PyObject* plan_move(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  Plan& plan = *reinterpret_cast<PyPlan*>(self)->plan;
  Arguments from(values, count);
  PyObject* weights = from.next();
  const bool searches = from.integer() != 0;
  const int threads = from.small();
  if (!from.complete() || !read_weights(weights, plan)) return nullptr;
  if (!plan.ready()) {
    PyErr_SetString(PyExc_RuntimeError, "move() needs a look() before it that found nothing");
    return nullptr;
  }
  return answer(plan.work(), [&] { plan.move(searches, threads); });
}

PyMethodDef plan_methods[] = {
    method<plan_look>("look"),
    method<plan_move>("move"),
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

}  // namespace

PyObject* plan_type() { return PyType_FromSpec(&plan_spec); }

}  // namespace fastmto
