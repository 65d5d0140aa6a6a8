#include "unchanged.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

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

// As it stands in the class or one of its bases; None where it stands in none.
PyObject* forward_of(PyTypeObject* type) {
  static PyObject* const name = PyUnicode_InternFromString("forward");
  PyObject* found = _PyType_Lookup(type, name);
  return found == nullptr ? Py_None : found;
}

py::object attributes_of(py::handle object) { return checked(PyObject_GenericGetDict(object.ptr(), nullptr)); }

// None stands for a key that is not there, too.
PyObject* value_of(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
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

Snapshot::Known::Known(py::handle object)
    : object_(object.ptr()),
      is_weak_(PyType_SUPPORTS_WEAKREFS(Py_TYPE(object.ptr()))),
      keeper_(is_weak_ ? checked(PyWeakref_NewRef(object.ptr(), nullptr)) : py::reinterpret_borrow<py::object>(object)) {}

// To compare: nobody holds it.
PyObject* Snapshot::Known::referent() const {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(keeper_.ptr(), &found) > 0) Py_DECREF(found);
  return found;
#else
  return PyWeakref_GetObject(keeper_.ptr());
#endif
}

py::object Snapshot::Known::alive() const { return py::reinterpret_borrow<py::object>(is(object_) ? object_ : nullptr); }

Snapshot::Snapshot(const py::list& objects, const py::list& attributes, const py::list& dicts, const py::list& counted,
                   const py::list& tensors, const py::list& storages, bool count_versions, const Memory& arrays,
                   const Memory& read)
    : is_expired_(py::module_::import("torch").attr("UntypedStorage").attr("_expired")),
      count_versions_(count_versions),
      words_(arrays),
      fingerprint_(words_.fingerprint()) {
  if (objects.size() != attributes.size()) throw std::invalid_argument("objects and attributes differ in length");
  if (tensors.size() != arrays.size()) throw std::invalid_argument("tensors and arrays differ in length");
  if (tensors.size() != storages.size()) throw std::invalid_argument("tensors and storages differ in length");
  std::unordered_set<PyObject*> asked, in_dicts;
  for (const py::handle object : objects) asked.insert(object.ptr());
  for (const py::handle tensor : tensors) asked.insert(tensor.ptr());
  Lines lines;
  const auto know = [&](py::handle object) {
    const Known known(object);
    lines.add_object(known.keeper());
    return known;
  };
  const auto know_entry = [&](PyObject* dict, py::handle key) {
    const py::handle value = value_of(dict, key.ptr());
    const Known known = asked.count(value.ptr()) > 0 ? Known::by_address(value) : know(value);
    in_dicts.insert(value.ptr());
    entries_.push_back({py::reinterpret_borrow<py::object>(key), known});
    lines.add_object(key);
  };
  for (size_t i = 0; i < objects.size(); ++i) {
    const py::object object = objects[i], held = attributes_of(object);
    const py::list names = attributes[i];
    lines.add(object.ptr(), sizeof(PyObject));
    lines.add_dict(held.ptr());
    for (const py::handle name : names) know_entry(held.ptr(), name);
    const size_t dicts_before = dicts_.size();
    const auto know_dict = [&](py::handle name, bool may_grow) {
      PyObject* dict = checked_dict(value_of(held.ptr(), name.ptr()));
      const Py_ssize_t size = PyDict_Size(dict);
      if (may_grow && size == 0) return;
      const size_t entries_before = entries_.size();
      for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(dict)) know_entry(dict, key);
      dicts_.push_back({py::reinterpret_borrow<py::object>(name), dict, may_grow ? PY_SSIZE_T_MAX : size,
                        entries_.size() - entries_before});
      lines.add_object(name);
      lines.add_dict(dict);
    };
    for (const py::handle name : dicts) know_dict(name, true);
    for (const py::handle name : counted) know_dict(name, false);
    PyTypeObject* type = Py_TYPE(object.ptr());
    objects_.push_back({know(object), know(reinterpret_cast<PyObject*>(type)), know(forward_of(type)), names.size(),
                        dicts_.size() - dicts_before});
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::object tensor = tensors[i], number = storages[i].attr("cdata");
    if (in_dicts.count(tensor.ptr()) == 0) throw std::invalid_argument("a tensor is in none of the objects' dicts");
    const int64_t version = count_versions ? version_of(tensor) : 0;
    tensors_.push_back({tensor.ptr(), storages[i], number, arrays[i].first, version, is_matrix(tensor),
                        count_elements(tensor), is_contiguous(tensor)});
    lines.add_object(tensor);
    lines.add_object(number);
  }
  lines.add(read);
  for (const char* word : words_.addresses()) lines.add(word, sizeof(uint32_t));
  lines_ = lines.sorted();
}

void Snapshot::prefetch() const {
  for (const char* line : lines_) __builtin_prefetch(line);
}

bool Snapshot::unchanged() const {
  if (!objects_are_unchanged()) return false;
  for (const Tensor& known : tensors_) {
    if (!is_unchanged(known)) return false;
  }
  return words_.fingerprint() == fingerprint_;  // last: the memory is there, since the tensors have not moved
}

bool Snapshot::objects_are_unchanged() const {
  const Entry* entry = entries_.data();
  const Dict* known_dict = dicts_.data();
  const auto holds = [&entry](PyObject* dict, size_t entries) {
    for (size_t i = 0; i < entries; ++i, ++entry) {
      if (!entry->value.is(value_of(dict, entry->key.ptr()))) return false;
    }
    return true;
  };
  for (const auto& [known, known_type, forward, attributes, dicts] : objects_) {
    const py::object object = known.alive();
    if (!object) return false;
    PyTypeObject* type = Py_TYPE(object.ptr());
    if (!known_type.is(reinterpret_cast<PyObject*>(type)) || !forward.is(forward_of(type))) return false;
    const py::object held = attributes_of(object);
    if (!holds(held.ptr(), attributes)) return false;
    for (size_t i = 0; i < dicts; ++i, ++known_dict) {
      const py::object dict = py::reinterpret_borrow<py::object>(value_of(held.ptr(), known_dict->name.ptr()));
      // Whether it is that one, or has taken its place, shows in what is in it.
      if (dict.ptr() != known_dict->address || !PyDict_Check(dict.ptr())) return false;
      if (PyDict_Size(dict.ptr()) > known_dict->most || !holds(dict.ptr(), known_dict->entries)) return false;
    }
  }
  return true;
}

bool Snapshot::is_unchanged(const Tensor& known) const {
  const py::object tensor = py::reinterpret_borrow<py::object>(known.tensor);
  if (address_of(tensor) != known.address) return false;
  if (checked(PyObject_CallOneArg(is_expired_.ptr(), known.number.ptr())).ptr() == Py_True) return false;
  if (count_versions_ && version_of(tensor) != known.version) return false;
  // Through `.data` a matrix becomes a part of itself, or itself transposed, which moves nothing and counts no version.
  return !known.matrix || (count_elements(tensor) == known.elements && is_contiguous(tensor) == known.contiguous);
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
