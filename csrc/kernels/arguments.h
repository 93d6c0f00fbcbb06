// How the bindings read Python's arguments and answer. Arguments come in as plain numbers and
// addresses; fastmto/ops/cpu.py and plan.py have checked what they point to. Plain C-API functions
// on vectors of arguments: with twenty of them, pybind11's dispatch would cost as much as a small
// tensor's whole step.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>

#include "kernels.h"

namespace fastmto {

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
inline Update update_of(Arguments& from) {
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

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  // The C API stores every calling convention in one pointer type and tells them apart by flag.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

}  // namespace fastmto
