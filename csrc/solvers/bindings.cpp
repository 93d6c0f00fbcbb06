// fastmto.solvers._solvers: the small-dimension solvers on ready numpy arrays and CPU tensors.
//
// A solve of two tasks takes tens of nanoseconds, so the calls go through METH_FASTCALL and the
// result is a plain extension type: the usual pybind11 dispatch and class would cost several times
// the solve. A Gram matrix is taken as a C-contiguous float64 array, or as a float64 or float32
// CPU tensor, contiguous as well; the other arguments as C-contiguous arrays. Nothing else is converted
// here: the functions return None and fastmto/solvers/convert.py converts.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <structmember.h>

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "aligned_mtl.h"
#include "bargaining.h"
#include "cagrad.h"
#include "dual_cone.h"
#include "fairgrad.h"
#include "imtl_g.h"
#include "mgda.h"
#include "pcgrad.h"
#include "simplex.h"
#include "tensors.h"

namespace py = pybind11;
namespace solvers = fastmto::solvers;
namespace tensors = fastmto::tensors;

namespace {

// Up to this many tasks the workspace is on the stack.
constexpr int kStackTasks = 64;
// From this many on the solve is long enough to give the interpreter away.
constexpr int kReleaseTasks = 24;
constexpr int kMaxTasks = 1 << 14;

const char* const kStatusNames[solvers::kStatusCount] = {
    "solved",  "not_finite",      "not_symmetric", "zero_update",
    "not_psd", "near_stationary", "unbounded",     "max_iterations",
    "singular"};

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

PyType_Spec result_spec = {"fastmto.solvers._solvers.Result", sizeof(Result), 0, Py_TPFLAGS_DEFAULT,
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

// Largest reference or preference of a projection: sums of T of them stay finite.
constexpr double kLargest = 1e300;

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
using Heap = std::unique_ptr<double, HeapDelete>;

Heap heap(std::size_t count) {
  count = (count + 7) / 8 * 8;
  return Heap(static_cast<double*>(std::aligned_alloc(64, count * sizeof(double))));
}

// A float64 matrix or vector with the kind of weights that answer to it.
struct Input {
  int tasks;
  const double* data;
  std::uint8_t bits;  // of the tensor, or 0 for a numpy array
  Heap copy;          // what `data` points to where it had to be converted
};

// Up to this many weights are kept on the stack before they become a tensor.
constexpr int kStackWeights = 512;

PyObject* new_weights(const Input& input, const double* values) {
  if (input.bits != 0) return tensors::new_vector(input.tasks, input.bits, values);
  PyObject* weights = py::array_t<double>(input.tasks).release().ptr();
  auto* out = reinterpret_cast<double*>(py::detail::array_proxy(weights)->data);
  for (int i = 0; i < input.tasks; ++i) out[i] = values[i];
  return weights;
}

// Calls solve(workspace, weights, info) and packs what it returns. kWorkspace: doubles by tasks.
template <std::size_t (*kWorkspace)(int), typename Solve>
PyObject* run(const Input& input, const Solve& solve) {
  const int tasks = input.tasks;
  double few[kStackWeights];
  Heap many;
  double* out = few;
  if (tasks > kStackWeights) {
    many = heap(tasks);
    out = many.get();
    if (out == nullptr) return PyErr_NoMemory();
  }
  solvers::Info info;
  solvers::Status status;
  if (tasks < kReleaseTasks) {
    alignas(64) double workspace[kWorkspace(kReleaseTasks)];
    status = solve(workspace, out, &info);
  } else if (tasks <= kStackTasks) {
    py::gil_scoped_release release;
    alignas(64) double workspace[kWorkspace(kStackTasks)];
    status = solve(workspace, out, &info);
  } else {
    const Heap workspace = heap(kWorkspace(tasks));
    if (workspace == nullptr) return PyErr_NoMemory();
    py::gil_scoped_release release;
    status = solve(workspace.get(), out, &info);
  }
  PyObject* weights =
      status == solvers::Status::kSolved ? new_weights(input, out) : Py_NewRef(Py_None);
  if (weights == nullptr) return nullptr;
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

// (T, T) for two dimensions, (T,) for one. False with an error set, or with none set where the
// object has to be converted first.
bool read(PyObject* object, const char* name, int expected, Input* input) {
  tensors::View view;
  const bool is_tensor = tensors::view_of(object, &view);
  const double* data = is_tensor ? nullptr : ready(object);
  if (!is_tensor && data == nullptr) return false;
  const int found = is_tensor ? view.dimensions : dimensions(object);
  std::int64_t shape[2] = {1, 1};
  for (int i = 0; i < expected && found == expected; ++i)
    shape[i] = is_tensor ? view.shape[i] : static_cast<std::int64_t>(length(object, i));
  if (found != expected || (expected == 2 && shape[0] != shape[1]) || shape[0] < 1 ||
      shape[0] > kMaxTasks) {
    PyErr_Format(PyExc_ValueError, "%s must have the shape %s with 1 <= T <= %d, got %S", name,
                 expected == 2 ? "(T, T)" : "(T,)", kMaxTasks,
                 py::tuple(py::reinterpret_borrow<py::object>(object).attr("shape")).ptr());
    return false;
  }
  input->tasks = static_cast<int>(shape[0]);
  input->data = data;
  input->bits = 0;
  if (!is_tensor) return true;
  input->bits = view.dtype.bits;
  if (view.dtype.bits == 64) {
    input->data = static_cast<const double*>(view.data);
    return true;
  }
  const std::int64_t count = shape[0] * shape[1];
  input->copy = heap(static_cast<std::size_t>(count));
  if (input->copy == nullptr) {
    PyErr_NoMemory();
    return false;
  }
  const auto* from = static_cast<const float*>(view.data);
  double* to = input->copy.get();
  for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(from[i]);
  input->data = to;
  return true;
}

bool takes(Py_ssize_t count, Py_ssize_t expected, const char* name) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd positional arguments, got %zd", name, expected,
               count);
  return false;
}

// A (T,) argument that is None or finite. False with an error set, or with none set where the
// array has to be converted.
bool finite_vector(PyObject* object, const char* name, int tasks, const double** data) {
  *data = nullptr;
  if (object == Py_None) return true;
  *data = ready(object);
  if (*data == nullptr) return false;
  if (dimensions(object) != 1 || length(object, 0) != tasks) {
    PyErr_Format(PyExc_ValueError, "%s must have the shape (%d,), got %R", name, tasks,
                 py::reinterpret_borrow<py::object>(object).attr("shape").ptr());
    return false;
  }
  for (int i = 0; i < tasks; ++i) {
    if (!(std::fabs((*data)[i]) <= kLargest)) {
      PyErr_Format(PyExc_ValueError, "%s must be finite and at most %g, got %R", name, kLargest,
                   object);
      return false;
    }
  }
  return true;
}

PyObject* unready() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

constexpr double kTiny = 2.2250738585072014e-308;
constexpr double kHuge = 1e300;
constexpr double kLargestC = 1e6;
constexpr double kSmallestAlpha = 0.01;
constexpr double kLargestAlpha = 100.0;

// bargaining(gram, method, preference, warm_start, tol, max_steps, ridge)
PyObject* bargaining(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (!takes(count, 7, "bargaining")) return nullptr;
  Input gram;
  solvers::Problem problem;
  const double* warm_start;
  double tol;
  if (!read(args[0], "gram", 2, &gram) ||
      !positive_vector(args[2], "preference", gram.tasks, &problem.preference) ||
      !positive_vector(args[3], "warm_start", gram.tasks, &warm_start))
    return unready();
  problem.tasks = gram.tasks;
  problem.gram = gram.data;
  if (!number(args[4], "tol", kTiny, 1.0, &tol) ||
      !number(args[6], "ridge", 0.0, kHuge, &problem.ridge))
    return nullptr;
  const bool text = PyUnicode_Check(args[1]);
  if (text && PyUnicode_CompareWithASCIIString(args[1], "exact") == 0) {
    return run<solvers::exact_workspace>(
        gram, [&](double* workspace, double* weights, solvers::Info* info) {
          return solvers::bargaining_exact(problem, warm_start, tol, workspace, weights, info);
        });
  }
  if (text && PyUnicode_CompareWithASCIIString(args[1], "ccp") == 0) {
    const long max_steps = PyLong_AsLong(args[5]);
    if (max_steps == -1 && PyErr_Occurred()) return nullptr;
    if (max_steps < 1 || max_steps > 1000000) {
      PyErr_Format(PyExc_ValueError, "max_steps must lie in [1, 1000000], got %R", args[5]);
      return nullptr;
    }
    return run<solvers::ccp_workspace>(
        gram, [&](double* workspace, double* weights, solvers::Info* info) {
          return solvers::bargaining_ccp(problem, warm_start, static_cast<int>(max_steps), tol,
                                         workspace, weights, info);
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
  if (!takes(count, 4, "ccp_step")) return nullptr;
  Input gram;
  solvers::Problem problem;
  const double* previous;
  if (!read(args[0], "gram", 2, &gram) ||
      !positive_vector(args[1], "previous", gram.tasks, &previous) ||
      !positive_vector(args[2], "preference", gram.tasks, &problem.preference))
    return unready();
  problem.tasks = gram.tasks;
  problem.gram = gram.data;
  if (!number(args[3], "ridge", 0.0, kHuge, &problem.ridge)) return nullptr;
  return run<solvers::ccp_workspace>(
      gram, [&](double* workspace, double* weights, solvers::Info* info) {
        return solvers::ccp_step(problem, previous, workspace, weights, info);
      });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// mgda(gram), imtl_g(gram)
template <auto kSolve, std::size_t (*kWorkspace)(int)>
PyObject* of_gram(PyObject*, PyObject* object) try {
  Input gram;
  if (!read(object, "gram", 2, &gram)) return unready();
  return run<kWorkspace>(gram, [&](double* workspace, double* weights, solvers::Info* info) {
    return kSolve(gram.tasks, gram.data, workspace, weights, info);
  });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// cagrad(gram, c)
PyObject* cagrad(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (!takes(count, 2, "cagrad")) return nullptr;
  Input gram;
  double c;
  if (!read(args[0], "gram", 2, &gram)) return unready();
  if (!number(args[1], "c", 0.0, kLargestC, &c)) return nullptr;
  return run<solvers::cagrad_workspace>(
      gram, [&](double* workspace, double* weights, solvers::Info* info) {
        return solvers::cagrad(gram.tasks, gram.data, c, workspace, weights, info);
      });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// dual_cone(gram, reference), upgrad(gram, preference)
template <auto kSolve>
PyObject* projection(const char* function, const char* name, PyObject* const* args,
                     Py_ssize_t count) try {
  if (!takes(count, 2, function)) return nullptr;
  Input gram;
  const double* vector;
  if (!read(args[0], "gram", 2, &gram) || !finite_vector(args[1], name, gram.tasks, &vector))
    return unready();
  return run<solvers::dual_cone_workspace>(
      gram, [&](double* workspace, double* weights, solvers::Info* info) {
        return kSolve(gram.tasks, gram.data, vector, workspace, weights, info);
      });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

PyObject* dual_cone(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return projection<solvers::dual_cone>("dual_cone", "reference", args, count);
}

PyObject* upgrad(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return projection<solvers::upgrad>("upgrad", "preference", args, count);
}

// aligned_mtl(gram, scale, eps); eps None: that of the numbers in gram.
PyObject* aligned_mtl(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (!takes(count, 3, "aligned_mtl")) return nullptr;
  Input gram;
  if (!read(args[0], "gram", 2, &gram)) return unready();
  solvers::Scale scale = solvers::Scale::kMin;
  bool known = PyUnicode_Check(args[1]);
  if (known && PyUnicode_CompareWithASCIIString(args[1], "min") != 0) {
    if (PyUnicode_CompareWithASCIIString(args[1], "median") == 0) {
      scale = solvers::Scale::kMedian;
    } else {
      scale = solvers::Scale::kRmse;
      known = PyUnicode_CompareWithASCIIString(args[1], "rmse") == 0;
    }
  }
  if (!known) {
    PyErr_Format(PyExc_ValueError, "scale must be 'min', 'median' or 'rmse', got %R", args[1]);
    return nullptr;
  }
  double eps = gram.bits == 32 ? double{FLT_EPSILON} : DBL_EPSILON;
  if (args[2] != Py_None && !number(args[2], "eps", 0.0, 1.0, &eps)) return nullptr;
  return run<solvers::aligned_mtl_workspace>(
      gram, [&](double* workspace, double* weights, solvers::Info* info) {
        return solvers::aligned_mtl(gram.tasks, gram.data, scale, eps, workspace, weights, info);
      });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// fairgrad(gram, alpha)
PyObject* fairgrad(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (!takes(count, 2, "fairgrad")) return nullptr;
  Input gram;
  double alpha;
  if (!read(args[0], "gram", 2, &gram)) return unready();
  if (!number(args[1], "alpha", kSmallestAlpha, kLargestAlpha, &alpha)) return nullptr;
  return run<solvers::fairgrad_workspace>(
      gram, [&](double* workspace, double* weights, solvers::Info* info) {
        return solvers::fairgrad(gram.tasks, gram.data, alpha, workspace, weights, info);
      });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// Whether row i of orders (tasks, tasks - 1) holds every task but i.
bool are_orders(int tasks, const std::int64_t* orders) {
  std::vector<int> seen(tasks, -1);
  for (int i = 0; i < tasks; ++i) {
    seen[i] = i;
    for (int k = 0; k < tasks - 1; ++k) {
      const std::int64_t j = *orders++;
      if (j < 0 || j >= tasks || seen[j] == i) return false;
      seen[j] = i;
    }
  }
  return true;
}

// pcgrad(gram, orders)
PyObject* pcgrad(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (!takes(count, 2, "pcgrad")) return nullptr;
  Input gram;
  if (!read(args[0], "gram", 2, &gram) ||
      !py::array_t<std::int64_t, py::array::c_style>::check_(args[1]))
    return unready();
  const auto* orders =
      reinterpret_cast<const std::int64_t*>(py::detail::array_proxy(args[1])->data);
  if (dimensions(args[1]) != 2 || length(args[1], 0) != gram.tasks ||
      length(args[1], 1) != gram.tasks - 1 || !are_orders(gram.tasks, orders)) {
    PyErr_Format(PyExc_ValueError,
                 "orders must have the shape (%d, %d) and in row i every task but i, got %R",
                 gram.tasks, gram.tasks - 1, args[1]);
    return nullptr;
  }
  return run<solvers::pcgrad_workspace>(
      gram, [&](double* workspace, double* weights, solvers::Info* info) {
        return solvers::pcgrad(gram.tasks, gram.data, orders, workspace, weights, info);
      });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

constexpr std::size_t no_workspace(int) { return 1; }

// simplex_projection(vector)
PyObject* simplex_projection(PyObject*, PyObject* object) try {
  Input vector;
  if (!read(object, "vector", 1, &vector)) return unready();
  return run<no_workspace>(vector, [&](double*, double* weights, solvers::Info* info) {
    return solvers::simplex_projection(vector.tasks, vector.data, weights, info);
  });
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

template <Fast kFunction>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction)),
          METH_FASTCALL, doc};
}

// All return a Result, or None where an argument has to be converted.
PyMethodDef functions[] = {
    method<bargaining>(
        "bargaining",
        "bargaining(gram, method, preference, warm_start, tol, max_steps, ridge)\n--\n\n"),
    method<ccp_step>("ccp_step", "ccp_step(gram, previous, preference, ridge)\n--\n\n"),
    {"mgda", of_gram<solvers::mgda, solvers::mgda_workspace>, METH_O, "mgda(gram)\n--\n\n"},
    {"imtl_g", of_gram<solvers::imtl_g, solvers::imtl_g_workspace>, METH_O,
     "imtl_g(gram)\n--\n\n"},
    method<cagrad>("cagrad", "cagrad(gram, c)\n--\n\n"),
    method<dual_cone>("dual_cone", "dual_cone(gram, reference)\n--\n\n"),
    method<upgrad>("upgrad", "upgrad(gram, preference)\n--\n\n"),
    method<aligned_mtl>("aligned_mtl", "aligned_mtl(gram, scale, eps)\n--\n\n"),
    method<fairgrad>("fairgrad", "fairgrad(gram, alpha)\n--\n\n"),
    method<pcgrad>("pcgrad", "pcgrad(gram, orders)\n--\n\n"),
    {"simplex_projection", simplex_projection, METH_O, "simplex_projection(vector)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_solvers, module) {
  module.doc() = "Small-dimension solvers on arrays and tensors; fastmto.solvers is the public side.";
  // numpy is imported here, not in the first solve.
  py::detail::npy_api::get();
  if (!tensors::load()) throw py::error_already_set();
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
