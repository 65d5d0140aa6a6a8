#include "cpu/fingerprint.h"

#include <cstring>

namespace fastbert::cpu {

Words::Words(const std::vector<std::pair<uintptr_t, int64_t>>& arrays) {
  constexpr int64_t most = 6;
  for (const auto& [address, bytes] : arrays) {
    const int64_t words = bytes / 4, samples = words < most ? words : most;
    // The last word is among them: who changes one end of an array alone is rare, but is found.
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t word = samples == 1 ? 0 : i * (words - 1) / (samples - 1);
      words_.push_back(reinterpret_cast<const char*>(address) + word * 4);
    }
  }
}

uint64_t Words::fingerprint() const {
  uint64_t hash = 14695981039346656037u;  // FNV-1a's offset and prime
  for (const char* address : words_) {
    uint32_t word;
    std::memcpy(&word, address, 4);
    hash = (hash ^ word) * 1099511628211u;
  }
  return hash;
}

}  // namespace fastbert::cpu
