// Which instruction set the kernels use: baseline (SSE2 or NEON), avx2, avx2_vnni (with the dot product of 8-bit integers),
// avx512, avx512_vnni, avx512_bf16 (with that product and the one of bfloat16) or avx512_amx (with tiles for both).

#pragma once

#include <string>
#include <vector>

namespace fastbert::cpu {

// Those that this CPU supports, from the narrowest to the widest; the widest is used unless another one is set.
std::vector<std::string> supported_instruction_sets();

const char* instruction_set();  // the same address for the same one

// Throws std::invalid_argument where the CPU does not support it.
void set_instruction_set(const std::string& name);

}  // namespace fastbert::cpu
