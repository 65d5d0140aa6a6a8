// Whether weights are still the ones that were packed.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fastbert::cpu {

// A few words of each of some arrays, spread evenly.
class Words {
 public:
  explicit Words(const std::vector<std::pair<uintptr_t, int64_t>>& arrays);  // (address, bytes)

  // A hash of what is in them now: an optimizer's step changes it, whatever it does to torch's version counters (an update
  // through `.data` leaves them alone), for the price of a few cache misses.
  uint64_t fingerprint() const;

  const std::vector<const char*>& addresses() const { return words_; }

 private:
  std::vector<const char*> words_;
};

}  // namespace fastbert::cpu
