// Whether Python objects are what they were: the comparisons of fastbert/model/snapshot.py.

#pragma once

#include <pybind11/pybind11.h>

namespace fastbert {

// Whether dicts[i][keys[i]] is values[i] for all i, by identity; None stands for a key that is not there, too. Lists of one
// length; raises what comparing keys raises.
bool holds_same(const pybind11::list& dicts, const pybind11::list& keys, const pybind11::list& values);

// Whether objects[i] is exactly of class types[i] for all i.
bool is_same_types(const pybind11::list& objects, const pybind11::list& types);

}  // namespace fastbert
