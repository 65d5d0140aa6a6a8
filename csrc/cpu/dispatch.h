// Which instruction set the kernels use: baseline (SSE2 or NEON), avx2, avx512 or avx512_bf16 (with
// VNNI: the dot products of bfloat16 and of 8-bit integers).

#pragma once

#include <string>
#include <vector>

namespace fastbert::cpu {

// Those that this CPU supports, from the narrowest to the widest; the widest is used unless another one is set.
std::vector<std::string> supported_instruction_sets();

std::string instruction_set();

// Throws std::invalid_argument where the CPU does not support it.
void set_instruction_set(const std::string& name);

}  // namespace fastbert::cpu
