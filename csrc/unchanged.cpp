#include "unchanged.h"

#include <stdexcept>

namespace fastbert {

namespace {

Py_ssize_t common_size(const pybind11::list& a, const pybind11::list& b) {
  if (a.size() != b.size()) throw std::invalid_argument("the lists differ in length");
  return PyList_GET_SIZE(a.ptr());
}

PyDictObject* dict_at(const pybind11::list& dicts, Py_ssize_t i) {
  PyObject* dict = PyList_GET_ITEM(dicts.ptr(), i);
  if (!PyDict_Check(dict)) throw std::invalid_argument("not a dict");
  return reinterpret_cast<PyDictObject*>(dict);
}

}  // namespace

// Whoever asks before each forward pass finds none of this in the caches, which the weights have passed through since. What
// the lookups read one after the other is therefore asked for at once: the dicts, then their tables.
bool holds_same(const pybind11::list& dicts, const pybind11::list& keys, const pybind11::list& values) {
  const Py_ssize_t size = common_size(dicts, keys);
  common_size(keys, values);
  for (Py_ssize_t i = 0; i < size; ++i) __builtin_prefetch(PyList_GET_ITEM(dicts.ptr(), i));
  for (Py_ssize_t i = 0; i < size; ++i) {
    const char* table = reinterpret_cast<const char*>(dict_at(dicts, i)->ma_keys);
    __builtin_prefetch(table);
    __builtin_prefetch(table + 64);
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* dict = reinterpret_cast<PyObject*>(dict_at(dicts, i));
    PyObject* found = PyDict_GetItemWithError(dict, PyList_GET_ITEM(keys.ptr(), i));
    // A key's __eq__ may do anything.
    if (common_size(dicts, keys) < size || common_size(keys, values) < size) {
      throw std::invalid_argument("the lists have become shorter");
    }
    if (found == nullptr) {
      if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
      found = Py_None;
    }
    if (found != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

bool is_same_types(const pybind11::list& objects, const pybind11::list& types) {
  const Py_ssize_t size = common_size(objects, types);
  for (Py_ssize_t i = 0; i < size; ++i) __builtin_prefetch(PyList_GET_ITEM(objects.ptr(), i));
  for (Py_ssize_t i = 0; i < size; ++i) {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(PyList_GET_ITEM(objects.ptr(), i)));
    if (type != PyList_GET_ITEM(types.ptr(), i)) return false;
  }
  return true;
}

}  // namespace fastbert
