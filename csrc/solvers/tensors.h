// torch tensors without linking against torch: the DLPack exchange table that torch >= 2.10 hangs
// on torch.Tensor gives a tensor's address and shape, and makes new tensors, in tens of
// nanoseconds (`.numpy()` and `torch.from_numpy` take a microsecond each).
//
// The structs are the ABI of DLPack 1.x, https://dmlc.github.io/dlpack. Part of the bindings.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fastmto::tensors {

constexpr std::uint32_t kMajorVersion = 1;
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kFloat = 2;

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct View {
  void* data;
  Device device;
  std::int32_t dimensions;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  std::uint64_t flags;
  View view;
};

struct Exchange {
  Version version;
  Exchange* previous;
  int (*allocate)(View* prototype, Managed** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, Managed** out);
  int (*object_from_managed)(Managed* tensor, void** out);
  int (*view_from_object)(void* object, View* out);
  int (*stream)(std::int32_t device_type, std::int32_t device_index, void** out);
};

// The table and the types it is for; all null before load(), or if torch has no such table.
struct Torch {
  const Exchange* exchange;
  PyTypeObject* tensor;
  PyTypeObject* parameter;
};

inline Torch torch = {nullptr, nullptr, nullptr};

// False with an error set if torch cannot be imported; a torch without the table is no error.
inline bool load() {
  PyObject* module = PyImport_ImportModule("torch");
  if (module == nullptr) return false;
  PyObject* tensor = PyObject_GetAttrString(module, "Tensor");
  PyObject* nn = PyObject_GetAttrString(module, "nn");
  PyObject* parameter = nn == nullptr ? nullptr : PyObject_GetAttrString(nn, "Parameter");
  Py_XDECREF(nn);
  Py_DECREF(module);
  if (tensor == nullptr || parameter == nullptr) {
    Py_XDECREF(tensor);
    Py_XDECREF(parameter);
    return false;
  }
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    auto* table =
        static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (table != nullptr && table->version.major != kMajorVersion) table = table->previous;
    if (table != nullptr && table->view_from_object != nullptr) {
      // The types live as long as the process: these references are kept.
      torch = {table, reinterpret_cast<PyTypeObject*>(tensor),
               reinterpret_cast<PyTypeObject*>(parameter)};
      Py_DECREF(capsule);
      return true;
    }
  }
  PyErr_Clear();
  Py_XDECREF(capsule);
  Py_DECREF(tensor);
  Py_DECREF(parameter);
  return true;
}

// Fills `view` if the object is a plain contiguous CPU tensor of float64 or float32. Any other
// goes through Python: among those with strides are torch's lazily negated ones.
inline bool view_of(PyObject* object, View* view) {
  const PyTypeObject* type = Py_TYPE(object);
  // A subclass may be anything: it goes through Python.
  if (type != torch.tensor && type != torch.parameter) return false;
  if (torch.tensor == nullptr || torch.exchange->view_from_object(object, view) != 0) {
    PyErr_Clear();
    return false;
  }
  std::int64_t stride = 1;
  for (int i = view->dimensions - 1; i >= 0; --i) {
    if (view->shape[i] != 1 && view->strides[i] != stride) return false;
    stride *= view->shape[i];
  }
  return view->device.type == kCpu && view->dtype.code == kFloat && view->dtype.lanes == 1 &&
         (view->dtype.bits == 64 || view->dtype.bits == 32) && view->byte_offset == 0;
}

inline void raise(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

// A new (length,) tensor of float64 or float32 with these values, or nullptr with an error set.
inline PyObject* new_vector(std::int64_t length, std::uint8_t bits, const double* values) {
  std::int64_t stride = 1;
  View prototype = {nullptr, {kCpu, 0}, 1, {kFloat, bits, 1}, &length, &stride, 0};
  Managed* managed = nullptr;
  if (torch.exchange->allocate(&prototype, &managed, nullptr, raise) != 0) return nullptr;
  if (bits == 64) {
    auto* out = static_cast<double*>(managed->view.data);
    for (std::int64_t i = 0; i < length; ++i) out[i] = values[i];
  } else {
    auto* out = static_cast<float*>(managed->view.data);
    for (std::int64_t i = 0; i < length; ++i) out[i] = static_cast<float>(values[i]);
  }
  void* object = nullptr;
  if (torch.exchange->object_from_managed(managed, &object) != 0) return nullptr;
  return static_cast<PyObject*>(object);
}

}  // namespace fastmto::tensors
