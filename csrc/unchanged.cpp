#include "unchanged.h"

#include <algorithm>
#include <stdexcept>

namespace fastbert {

namespace py = pybind11;

namespace {

constexpr uintptr_t kLineBytes = 64;

py::object checked(PyObject* reference) {
  if (reference == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(reference);
}

PyObject* checked_dict(py::handle object) {
  if (!PyDict_Check(object.ptr())) throw std::invalid_argument("not a dict");
  return object.ptr();
}

// None stands for a key that is not there, too.
PyObject* value_of(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found == nullptr ? Py_None : found;
}

// As it stands in the class or one of its bases; None where it stands in none.
PyObject* forward_of(py::handle type) {
  static PyObject* const name = PyUnicode_InternFromString("forward");
  PyObject* found = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(type.ptr()), name);
  return found == nullptr ? Py_None : found;
}

uint64_t call_for_number(py::handle object, PyObject* name) {
  const py::object number = checked(PyObject_CallMethodNoArgs(object.ptr(), name));
  const auto value = PyLong_AsUnsignedLongLong(number.ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

uintptr_t address_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  return call_for_number(tensor, name);
}

uint64_t count_elements(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("numel");
  return call_for_number(tensor, name);
}

bool is_matrix(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("dim");
  return call_for_number(tensor, name) > 1;
}

bool is_contiguous(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_contiguous");
  return checked(PyObject_CallMethodNoArgs(tensor.ptr(), name)).ptr() == Py_True;
}

int64_t version_of(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const py::object version = checked(PyObject_GetAttr(tensor.ptr(), name));
  const auto value = PyLong_AsLongLong(version.ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// The lines of the caches that some memory lies in.
class Lines {
 public:
  void add(const void* start, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(start);
    for (uintptr_t line = first / kLineBytes; line * kLineBytes < first + bytes; ++line) lines_.push_back(line);
  }

  void add(const Memory& memory) {
    for (const auto& [address, bytes] : memory) add(reinterpret_cast<const void*>(address), bytes);
  }

  void add_object(py::handle object) { add(object.ptr(), Py_TYPE(object.ptr())->tp_basicsize); }

  // Its head and its table, of which Python does not tell the size: a hash table of 16 bytes an entry, a third of them free.
  void add_dict(PyObject* object) {
    const auto* dict = reinterpret_cast<PyDictObject*>(object);
    const int64_t entries = dict->ma_used;
    add(dict, sizeof(PyDictObject));
    add(dict->ma_keys, 96 + 24 * entries);
    if (dict->ma_values != nullptr) add(dict->ma_values, 8 + 8 * entries);
  }

  std::vector<const char*> sorted() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
    std::vector<const char*> addresses;
    for (const uintptr_t line : lines_) addresses.push_back(reinterpret_cast<const char*>(line * kLineBytes));
    return addresses;
  }

 private:
  std::vector<uintptr_t> lines_;
};

}  // namespace

Snapshot::Snapshot(const py::list& dicts, const py::list& keys, const py::list& objects, const py::list& classes,
                   const py::list& counted, const py::list& tensors, bool count_versions, const Memory& arrays,
                   const Memory& read)
    : count_versions_(count_versions), words_(arrays), fingerprint_(words_.fingerprint()) {
  if (dicts.size() != keys.size()) throw std::invalid_argument("dicts and keys differ in length");
  Lines lines;
  for (size_t i = 0; i < dicts.size(); ++i) {
    const py::object dict = dicts[i], key = keys[i];
    const py::object value = py::reinterpret_borrow<py::object>(value_of(checked_dict(dict), key.ptr()));
    places_.push_back({dict, key, value});
    lines.add_dict(dict.ptr());
    lines.add_object(key);
  }
  for (const py::handle object : objects) {
    types_.push_back({py::reinterpret_borrow<py::object>(object), py::type::of(object)});
    lines.add(object.ptr(), sizeof(PyObject));
  }
  for (const py::handle type : classes) {
    if (!PyType_Check(type.ptr())) throw std::invalid_argument("not a class");
    classes_.push_back({py::reinterpret_borrow<py::object>(type), py::reinterpret_borrow<py::object>(forward_of(type))});
    lines.add_object(type);
  }
  for (const py::handle dict : counted) {
    counts_.push_back({py::reinterpret_borrow<py::object>(dict), PyDict_Size(checked_dict(dict))});
    lines.add(dict.ptr(), sizeof(PyDictObject));
  }
  for (const py::handle tensor : tensors) {
    const int64_t version = count_versions ? version_of(tensor) : 0;
    tensors_.push_back({py::reinterpret_borrow<py::object>(tensor), address_of(tensor), version, is_matrix(tensor),
                        count_elements(tensor), is_contiguous(tensor)});
    lines.add_object(tensor);
  }
  lines.add(read);
  for (const char* word : words_.addresses()) lines.add(word, sizeof(uint32_t));
  lines_ = lines.sorted();
}

void Snapshot::prefetch() const {
  for (const char* line : lines_) __builtin_prefetch(line);
}

bool Snapshot::unchanged() const {
  for (const auto& [object, type] : types_) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type.ptr()) return false;
  }
  for (const auto& [type, forward] : classes_) {
    if (forward_of(type) != forward.ptr()) return false;
  }
  for (const auto& [dict, count] : counts_) {
    if (PyDict_Size(dict.ptr()) != count) return false;
  }
  for (const auto& [dict, key, value] : places_) {
    if (value_of(dict.ptr(), key.ptr()) != value.ptr()) return false;
  }
  for (const auto& [tensor, address, version, matrix, elements, contiguous] : tensors_) {
    if (address_of(tensor) != address || (count_versions_ && version_of(tensor) != version)) return false;
    // Through `.data` a matrix becomes a part of itself, or itself transposed, which moves nothing and counts no version.
    if (matrix && (count_elements(tensor) != elements || is_contiguous(tensor) != contiguous)) return false;
  }
  return words_.fingerprint() == fingerprint_;  // last: the memory is there, since the tensors have not moved
}

bool all_unchanged(const std::vector<const Snapshot*>& snapshots) {
  if (!snapshots.empty()) snapshots.front()->prefetch();
  for (size_t i = 0; i < snapshots.size(); ++i) {
    if (i + 1 < snapshots.size()) snapshots[i + 1]->prefetch();
    if (!snapshots[i]->unchanged()) return false;
  }
  return true;
}

}  // namespace fastbert
