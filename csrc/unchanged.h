// Whether Python objects are what they were: the comparisons of fastbert/model/snapshot.py.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/fingerprint.h"

namespace fastbert {

using Memory = std::vector<std::pair<uintptr_t, int64_t>>;  // (address, bytes) each

// What some dicts hold under some keys, the classes of some objects, what `forward` is in some classes, how many entries
// some dicts have, and of tensors where they are, their version counters and a few words, of matrices also how large they
// are and whether contiguous, all as it is when this is made.
class Snapshot {
 public:
  // keys[i] belongs to dicts[i]; a key need not be there. tensors: torch's, whose memory is arrays; count_versions: whether
  // they have version counters. read: memory that torch reads when it is asked about the tensors.
  Snapshot(const pybind11::list& dicts, const pybind11::list& keys, const pybind11::list& objects,
           const pybind11::list& classes, const pybind11::list& counted, const pybind11::list& tensors, bool count_versions,
           const Memory& arrays, const Memory& read);

  // Compares all of it, objects by identity. Raises what comparing keys raises.
  bool unchanged() const;

  // Asks for the memory that unchanged() reads. Whoever asks before each forward pass finds none of it in the caches, which
  // the weights have passed through since, and reads one thing to know where the next one is.
  void prefetch() const;

 private:
  struct Place {
    pybind11::object dict, key, value;
  };
  struct Typed {
    pybind11::object object, type;
  };
  struct Class {
    pybind11::object type, forward;
  };
  struct Counted {
    pybind11::object dict;
    Py_ssize_t count;
  };
  struct Tensor {
    pybind11::object tensor;
    uintptr_t address;
    int64_t version;
    bool matrix;
    uint64_t elements;
    bool contiguous;
  };

  std::vector<Place> places_;
  std::vector<Typed> types_;
  std::vector<Class> classes_;
  std::vector<Counted> counts_;
  std::vector<Tensor> tensors_;
  bool count_versions_;
  cpu::Words words_;
  uint64_t fingerprint_;
  std::vector<const char*> lines_;
};

// Whether none of them has changed.
bool all_unchanged(const std::vector<const Snapshot*>& snapshots);

}  // namespace fastbert
