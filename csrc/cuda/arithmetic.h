// The arithmetic of the CUDA kernels that is not CUDA: compiled for the device by nvcc, and for the host by a test.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTBERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTBERT_HOST_DEVICE inline
#endif

namespace fastbert::cuda {

struct Words {
  uint32_t w[4];
};

FASTBERT_HOST_DEVICE uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
FASTBERT_HOST_DEVICE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  constexpr uint32_t multiplier0 = 0xD2511F53, multiplier1 = 0xCD9E8D57;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(multiplier0, c0), low0 = multiplier0 * c0;
    const uint32_t high1 = high_product(multiplier1, c2), low1 = multiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// Whether column keeps its element; words: of philox(column / 8, row, plane, stream, seed).
FASTBERT_HOST_DEVICE bool keeps(const Words& words, uint32_t column, uint32_t threshold) {
  const uint32_t lane = column % 8;
  // Chosen by comparisons: an index that is not known at compile time would put the words into memory.
  const uint32_t word = lane < 4 ? (lane < 2 ? words.w[0] : words.w[1]) : (lane < 6 ? words.w[2] : words.w[3]);
  return ((word >> (16 * (lane % 2))) & 0xFFFF) >= threshold;
}

// The same of two columns, by a word of that call, as bits 15 and 31. A threshold of 65536 keeps all: it is scaled by 0.
FASTBERT_HOST_DEVICE uint32_t kept_halves(uint32_t word, uint32_t threshold) {
  const uint32_t shifted = threshold << 16;  // the lower half does not decide
  return (word >= shifted ? 0x80000000 : 0) | (word << 16 >= shifted ? 0x8000 : 0);
}

// Phi(u) through erfc of the smaller tail, which keeps its digits where 1 + erf loses them.
FASTBERT_HOST_DEVICE float normal_cdf(float u) { return 0.5f * erfcf(-0.70710678118654752f * u); }

FASTBERT_HOST_DEVICE float gelu(float u) { return u * normal_cdf(u); }

// cdf: normal_cdf(u).
FASTBERT_HOST_DEVICE float gelu_derivative(float u, float cdf) {
  return cdf + u * (0.3989422804014327f * expf(-0.5f * u * u));
}

// The gradient of a LayerNorm's input; c1, c2: the row's means of dx_hat * x_hat and dx_hat, with dx_hat = dy * weight.
FASTBERT_HOST_DEVICE float layer_norm_gradient(float dx_hat, float x_hat, float rstd, float c1, float c2) {
  return (dx_hat - x_hat * c1 - c2) * rstd;
}

// What a softmax knows of the scores so far: their maximum and the sum of exp(score - maximum).
struct SoftmaxSums {
  float max, sum;
};

// The number that scores are reduced by: scores of -infinity alone have no maximum that could be subtracted from them.
FASTBERT_HOST_DEVICE float softmax_base(float max) { return max == -INFINITY ? 0.0f : max; }

// exp: the function of that name, or one that suffices.
template <typename Exp>
FASTBERT_HOST_DEVICE SoftmaxSums merge(const Exp& exp, const SoftmaxSums& a, const SoftmaxSums& b) {
  const float max = fmaxf(a.max, b.max), base = softmax_base(max);
  return {max, a.sum * exp(a.max - base) + b.sum * exp(b.max - base)};
}

// The gradient of a row's loss, times dloss, by one of its scores; normalizer: 1 / sum; target: what label smoothing makes
// of 0 and 1. A dloss of 0 gives 0 whatever the score is.
template <typename Exp>
FASTBERT_HOST_DEVICE float softmax_gradient(const Exp& exp, float score, float max, float normalizer, float target,
                                            float dloss) {
  return dloss == 0.0f ? 0.0f : (exp(score - max) * normalizer - target) * dloss;
}

}  // namespace fastbert::cuda
