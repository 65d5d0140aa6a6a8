// Whether weights are still the ones that were packed.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fastbert::cpu {

// A hash of a few words of each array (address, bytes), spread evenly: an optimizer's step changes it, whatever it does to
// torch's version counters (an update through `.data` leaves them alone), for the price of a few cache misses.
uint64_t fingerprint(const std::vector<std::pair<uintptr_t, int64_t>>& arrays);

}  // namespace fastbert::cpu
