#include "cpu/fingerprint.h"

#include <cstring>

namespace fastbert::cpu {

uint64_t fingerprint(const std::vector<std::pair<uintptr_t, int64_t>>& arrays) {
  constexpr int64_t samples = 16;
  uint64_t hash = 14695981039346656037u;  // FNV-1a's offset and prime
  for (const auto& [address, bytes] : arrays) {
    const int64_t words = bytes / 4;
    for (int64_t i = 0; i < samples && i < words; ++i) {
      uint32_t word;
      std::memcpy(&word, reinterpret_cast<const char*>(address) + (i * words / samples) * 4, 4);
      hash = (hash ^ word) * 1099511628211u;
    }
  }
  return hash;
}

}  // namespace fastbert::cpu
