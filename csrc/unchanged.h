// Whether Python objects are what they were: the comparisons of fastbert/model/snapshot.py.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/fingerprint.h"

namespace fastbert {

using Memory = std::vector<std::pair<uintptr_t, int64_t>>;  // (address, bytes) each

// Of some objects their classes and what `forward` is in these, what is under some of their attributes, and what is in those
// of their attributes that are dicts; of tensors where they are, their version counters and a few words, of matrices also
// how large they are and whether contiguous, all as it is when this is made.
//
// It keeps none of it alive: what hangs on to a module (a hook that knows the model, an attribute) may hang on to whoever
// keeps the snapshot for as long as that module lives, too.
class Snapshot {
 public:
  // objects[i] has the attributes attributes[i], by name, which need not be there; under each name of `dicts` it has a dict,
  // whose entries of now are compared, and of `counted` one that may not have others either. tensors: torch's, each
  // of which is in one of those dicts, whose memory is arrays; storages: a StorageWeakRef for each, because memory that was
  // freed is given to others, who may be its successors; count_versions: whether they have version counters. read: memory
  // that torch reads when it is asked about them.
  Snapshot(const pybind11::list& objects, const pybind11::list& attributes, const pybind11::list& dicts,
           const pybind11::list& counted, const pybind11::list& tensors, const pybind11::list& storages, bool count_versions,
           const Memory& arrays, const Memory& read);

  // Compares all of it, objects by identity. Raises what comparing keys raises.
  bool unchanged() const;

  // Asks for the memory that unchanged() reads. Whoever asks before each forward pass finds none of it in the caches, which
  // the weights have passed through since, and reads one thing to know where the next one is.
  void prefetch() const;

 private:
  // An object, by identity: another one may be at its address once it is gone.
  class Known {
   public:
    explicit Known(pybind11::handle object);
    // One that is among the objects and tensors of the snapshot, where it is asked whether it is gone.
    static Known by_address(pybind11::handle object) { return Known(object.ptr(), false, {}); }

    bool is(PyObject* found) const { return found == object_ && (!is_weak_ || found == referent()); }
    // nullptr where it is gone.
    pybind11::object alive() const;
    // What is() reads, if anything.
    pybind11::handle keeper() const { return keeper_; }

   private:
    Known(PyObject* object, bool is_weak, pybind11::object keeper)
        : object_(object), is_weak_(is_weak), keeper_(std::move(keeper)) {}
    PyObject* referent() const;

    PyObject* object_;
    bool is_weak_;
    pybind11::object keeper_;  // a weak reference, or the object itself where its class has none (numbers, None)
  };
  struct Entry {
    pybind11::object key;
    Known value;
  };
  struct Dict {
    pybind11::object name;
    PyObject* address;
    Py_ssize_t most;  // entries that it may have
    size_t entries;
  };
  struct Object {
    Known object, type, forward;
    size_t attributes, dicts;
  };
  struct Tensor {
    PyObject* tensor;          // which is there: the dict that holds it was compared before. No weak reference: torch does
                               // not swap a tensor that has one
    pybind11::object storage;  // keeps the number valid
    pybind11::object number;   // by which torch knows the storage
    uintptr_t address;
    int64_t version;
    bool matrix;
    uint64_t elements;
    bool contiguous;
  };

  bool objects_are_unchanged() const;
  bool is_unchanged(const Tensor& known) const;

  // One behind the other as they are read, so that the memory of the next ones is on its way.
  std::vector<Object> objects_;
  std::vector<Dict> dicts_;
  std::vector<Entry> entries_;
  std::vector<Tensor> tensors_;
  pybind11::object is_expired_;  // torch's answer by a storage's number
  bool count_versions_;
  cpu::Words words_;
  uint64_t fingerprint_;
  std::vector<const char*> lines_;
};

// Whether none of them has changed.
bool all_unchanged(const std::vector<const Snapshot*>& snapshots);

}  // namespace fastbert
