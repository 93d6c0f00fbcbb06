// fastmto._solvers: the small-dimension solvers on ready numpy arrays.
//
// A solve of two tasks takes tens of nanoseconds, so the calls go through METH_FASTCALL and the
// result is a plain extension type: the usual pybind11 dispatch and class would cost several times
// the solve. Arrays that are not float64 and C-contiguous are not converted here: the functions
// return None and fastmto/solvers/bargaining.py converts.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <structmember.h>

#include <cstdlib>
#include <memory>

#include "bargaining.h"

namespace py = pybind11;
namespace solvers = fastmto::solvers;

namespace {

// Up to this many tasks the workspace is on the stack.
constexpr int kStackTasks = 64;
// From this many on the solve is long enough to give the interpreter away.
constexpr int kReleaseTasks = 24;
constexpr int kMaxTasks = 1 << 14;

const char* const kStatusNames[solvers::kStatusCount] = {
    "solved",  "not_finite",      "not_symmetric", "zero_update",
    "not_psd", "near_stationary", "unbounded",     "max_iterations"};

PyObject* status_names[solvers::kStatusCount];
PyTypeObject* result_type;

struct Result {
  PyObject_HEAD
  PyObject* weights;
  PyObject* status;
  int iterations;
  double residual;
  double kappa;
};

Result* new_result(PyObject* weights, PyObject* status, int iterations, double residual,
                   double kappa) {
  auto* self = reinterpret_cast<Result*>(result_type->tp_alloc(result_type, 0));
  if (self == nullptr) return nullptr;
  self->weights = Py_NewRef(weights);
  self->status = Py_NewRef(status);
  self->iterations = iterations;
  self->residual = residual;
  self->kappa = kappa;
  return self;
}

PyObject* result_new(PyTypeObject*, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"weights", "status", "iterations", "residual", "kappa", nullptr};
  PyObject *weights, *status;
  int iterations;
  double residual, kappa;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OUidd:Result", const_cast<char**>(names),
                                   &weights, &status, &iterations, &residual, &kappa))
    return nullptr;
  for (PyObject* known : status_names) {
    // One object per status, so that `ok` is a comparison of pointers.
    if (PyUnicode_Compare(status, known) == 0) status = known;
  }
  return reinterpret_cast<PyObject*>(new_result(weights, status, iterations, residual, kappa));
}

void result_dealloc(PyObject* object) {
  auto* self = reinterpret_cast<Result*>(object);
  PyTypeObject* type = Py_TYPE(object);
  Py_XDECREF(self->weights);
  Py_XDECREF(self->status);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject* result_repr(PyObject* object) {
  auto* self = reinterpret_cast<Result*>(object);
  return py::str("Result(weights={!r}, status={!r}, iterations={}, residual={:.3g}, kappa={:.3g})")
      .format(py::handle(self->weights), py::handle(self->status), self->iterations,
              self->residual, self->kappa)
      .release()
      .ptr();
}

PyObject* result_reduce(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<Result*>(object);
  return Py_BuildValue("O(OOidd)", Py_TYPE(object), self->weights, self->status, self->iterations,
                       self->residual, self->kappa);
}

PyObject* result_ok(PyObject* object, void*) {
  return PyBool_FromLong(reinterpret_cast<Result*>(object)->status == status_names[0]);
}

PyMemberDef result_members[] = {
    {"weights", T_OBJECT, offsetof(Result, weights), READONLY,
     "The weights (T,), or None where the status is not 'solved'."},
    {"status", T_OBJECT, offsetof(Result, status), READONLY, "How the solve ended."},
    {"iterations", T_INT, offsetof(Result, iterations), READONLY, "Steps taken."},
    {"residual", T_DOUBLE, offsetof(Result, residual), READONLY, "How exact the weights are."},
    {"kappa", T_DOUBLE, offsetof(Result, kappa), READONLY, "Nearness to Pareto stationarity."},
    {nullptr, 0, 0, 0, nullptr}};

PyGetSetDef result_getset[] = {
    {"ok", result_ok, nullptr, "Whether the status is 'solved'.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyMethodDef result_methods[] = {
    {"__reduce__", result_reduce, METH_NOARGS, nullptr},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot result_slots[] = {
    {Py_tp_doc, const_cast<char*>(
                    "Result(weights, status, iterations, residual, kappa)\n--\n\n"
                    "Weights of a small solver with how it ended; see fastmto.solvers.bargaining.")},
    {Py_tp_new, reinterpret_cast<void*>(result_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(result_dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(result_repr)},
    {Py_tp_members, result_members},
    {Py_tp_getset, result_getset},
    {Py_tp_methods, result_methods},
    {0, nullptr}};

PyType_Spec result_spec = {"fastmto._solvers.Result", sizeof(Result), 0, Py_TPFLAGS_DEFAULT,
                           result_slots};

// The data of a C-contiguous float64 array, or nullptr if it has to be converted first.
const double* ready(PyObject* object) {
  if (!py::array_t<double, py::array::c_style>::check_(object)) return nullptr;
  return reinterpret_cast<const double*>(py::detail::array_proxy(object)->data);
}

int dimensions(PyObject* array) { return py::detail::array_proxy(array)->nd; }
py::ssize_t length(PyObject* array, int axis) {
  return py::detail::array_proxy(array)->dimensions[axis];
}

// A (T,) argument that is None or positive. False with an error set, or with none set where the
// array has to be converted.
bool positive_vector(PyObject* object, const char* name, py::ssize_t tasks, const double** data) {
  *data = nullptr;
  if (object == Py_None) return true;
  *data = ready(object);
  if (*data == nullptr) return false;
  if (dimensions(object) != 1 || length(object, 0) != tasks) {
    PyErr_Format(PyExc_ValueError, "%s must have the shape (%zd,), got %R", name, tasks,
                 py::reinterpret_borrow<py::object>(object).attr("shape").ptr());
    return false;
  }
  for (py::ssize_t i = 0; i < tasks; ++i) {
    if (!((*data)[i] > 0.0 && (*data)[i] <= 1.7976931348623157e308)) {
      PyErr_Format(PyExc_ValueError, "%s must be positive and finite, got %R", name, object);
      return false;
    }
  }
  return true;
}

struct HeapDelete {
  void operator()(double* p) const { std::free(p); }
};

template <typename Solve>
PyObject* run(py::ssize_t tasks, std::size_t workspace_size, const Solve& solve) {
  PyObject* weights = py::array_t<double>(tasks).release().ptr();
  auto* out = reinterpret_cast<double*>(py::detail::array_proxy(weights)->data);
  solvers::Info info;
  solvers::Status status;
  if (tasks < kReleaseTasks) {
    alignas(64) double workspace[solvers::ccp_workspace(kReleaseTasks)];
    status = solve(workspace, out, &info);
  } else if (tasks <= kStackTasks) {
    py::gil_scoped_release release;
    alignas(64) double workspace[solvers::ccp_workspace(kStackTasks)];
    status = solve(workspace, out, &info);
  } else {
    std::unique_ptr<double, HeapDelete> workspace(
        static_cast<double*>(std::aligned_alloc(64, workspace_size * sizeof(double))));
    if (workspace == nullptr) {
      Py_DECREF(weights);
      return PyErr_NoMemory();
    }
    py::gil_scoped_release release;
    status = solve(workspace.get(), out, &info);
  }
  if (status != solvers::Status::kSolved) {
    Py_DECREF(weights);
    weights = Py_NewRef(Py_None);
  }
  auto* result = new_result(weights, status_names[static_cast<int>(status)], info.iterations,
                            info.residual, info.kappa);
  Py_DECREF(weights);
  return reinterpret_cast<PyObject*>(result);
}

bool number(PyObject* object, const char* name, double low, double high, double* value) {
  *value = PyFloat_AsDouble(object);
  if (*value == -1.0 && PyErr_Occurred()) return false;
  if (!(*value >= low && *value < high)) {
    PyErr_Format(PyExc_ValueError, "%s must lie in [%g, %g), got %R", name, low, high, object);
    return false;
  }
  return true;
}

// The (T, T) Gram matrix. False with or without an error set, as positive_vector.
bool square(PyObject* object, solvers::Problem* problem) {
  problem->gram = ready(object);
  if (problem->gram == nullptr) return false;
  if (dimensions(object) != 2 || length(object, 0) != length(object, 1) ||
      length(object, 0) < 1 || length(object, 0) > kMaxTasks) {
    PyErr_Format(PyExc_ValueError,
                 "gram must have the shape (T, T) with 1 <= T <= %d, got %R", kMaxTasks,
                 py::reinterpret_borrow<py::object>(object).attr("shape").ptr());
    return false;
  }
  problem->tasks = static_cast<int>(length(object, 0));
  return true;
}

PyObject* unready() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

constexpr double kTiny = 2.2250738585072014e-308;
constexpr double kHuge = 1e300;

// bargaining(gram, method, preference, warm_start, tol, max_steps, ridge)
PyObject* bargaining(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 7) {
    PyErr_SetString(PyExc_TypeError, "bargaining takes 7 positional arguments");
    return nullptr;
  }
  solvers::Problem problem;
  const double* warm_start;
  double tol;
  if (!square(args[0], &problem) ||
      !positive_vector(args[2], "preference", problem.tasks, &problem.preference) ||
      !positive_vector(args[3], "warm_start", problem.tasks, &warm_start))
    return unready();
  if (!number(args[4], "tol", kTiny, 1.0, &tol) ||
      !number(args[6], "ridge", 0.0, kHuge, &problem.ridge))
    return nullptr;
  const bool text = PyUnicode_Check(args[1]);
  if (text && PyUnicode_CompareWithASCIIString(args[1], "exact") == 0) {
    return run(problem.tasks, solvers::exact_workspace(problem.tasks),
               [&](double* workspace, double* weights, solvers::Info* info) {
                 return solvers::bargaining_exact(problem, warm_start, tol, workspace, weights,
                                                  info);
               });
  }
  if (text && PyUnicode_CompareWithASCIIString(args[1], "ccp") == 0) {
    const long max_steps = PyLong_AsLong(args[5]);
    if (max_steps == -1 && PyErr_Occurred()) return nullptr;
    if (max_steps < 1 || max_steps > 1000000) {
      PyErr_Format(PyExc_ValueError, "max_steps must lie in [1, 1000000], got %R", args[5]);
      return nullptr;
    }
    return run(problem.tasks, solvers::ccp_workspace(problem.tasks),
               [&](double* workspace, double* weights, solvers::Info* info) {
                 return solvers::bargaining_ccp(problem, warm_start, static_cast<int>(max_steps),
                                                tol, workspace, weights, info);
               });
  }
  PyErr_Format(PyExc_ValueError, "method must be 'exact' or 'ccp', got %R", args[1]);
  return nullptr;
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// ccp_step(gram, previous, preference, ridge)
PyObject* ccp_step(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "ccp_step takes 4 positional arguments");
    return nullptr;
  }
  solvers::Problem problem;
  const double* previous;
  if (!square(args[0], &problem) ||
      !positive_vector(args[1], "previous", problem.tasks, &previous) ||
      !positive_vector(args[2], "preference", problem.tasks, &problem.preference))
    return unready();
  if (!number(args[3], "ridge", 0.0, kHuge, &problem.ridge)) return nullptr;
  return run(problem.tasks, solvers::ccp_workspace(problem.tasks),
             [&](double* workspace, double* weights, solvers::Info* info) {
               return solvers::ccp_step(problem, previous, workspace, weights, info);
             });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

PyMethodDef functions[] = {
    {"bargaining",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
         static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(bargaining))),
     METH_FASTCALL,
     "bargaining(gram, method, preference, warm_start, tol, max_steps, ridge)\n--\n\n"
     "Result, or None where an array is not C-contiguous float64."},
    {"ccp_step",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
         static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(ccp_step))),
     METH_FASTCALL,
     "ccp_step(gram, previous, preference, ridge)\n--\n\n"
     "Result, or None where an array is not C-contiguous float64."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_solvers, module) {
  module.doc() = "Small-dimension solvers on numpy arrays; fastmto.solvers is the public side.";
  // numpy is imported here, not in the first solve.
  py::detail::npy_api::get();
  for (int i = 0; i < solvers::kStatusCount; ++i) {
    status_names[i] = PyUnicode_InternFromString(kStatusNames[i]);
    if (status_names[i] == nullptr) throw py::error_already_set();
  }
  result_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&result_spec));
  if (result_type == nullptr) throw py::error_already_set();
  module.attr("Result") = py::handle(reinterpret_cast<PyObject*>(result_type));
  py::tuple names(solvers::kStatusCount);
  for (int i = 0; i < solvers::kStatusCount; ++i) names[i] = py::handle(status_names[i]);
  module.attr("STATUSES") = names;
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}
