// The arithmetic of AdamW and LAMB, for the device and for the host: one direction for both. AdamW's step is
// x -= rate * direction, which is its decoupled weight decay; LAMB's has the tensor's trust ratio for another factor.

#pragma once

#include "cuda/arithmetic.h"
#include "fastbert.h"

namespace fastbert::cuda {

// In double, because 1 - beta^step would lose its digits in float, and once per tensor; step: from 1.
FASTBERT_HOST_DEVICE OptimizerCoefficients optimizer_coefficients(const OptimizerGroup& group, double rate, double step) {
  OptimizerCoefficients c;
  c.beta1 = static_cast<float>(group.beta1);
  c.new1 = static_cast<float>(1.0 - group.beta1);
  c.beta2 = static_cast<float>(group.beta2);
  c.new2 = static_cast<float>(1.0 - group.beta2);
  c.first = static_cast<float>(1.0 / (1.0 - pow(group.beta1, step)));
  c.second = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, step)));
  c.eps = static_cast<float>(group.eps);
  c.weight_decay = static_cast<float>(group.weight_decay);
  c.rate = static_cast<float>(rate);
  c.trust_ratio = group.trust_ratio ? 1.0f : 0.0f;
  return c;
}

FASTBERT_HOST_DEVICE void average(const OptimizerCoefficients& c, float gradient, float& average, float& square) {
  average = c.beta1 * average + c.new1 * gradient;
  square = c.beta2 * square + c.new2 * (gradient * gradient);
}

FASTBERT_HOST_DEVICE float direction(const OptimizerCoefficients& c, float parameter, float average, float square) {
  return c.first * average / (c.second * sqrtf(square) + c.eps) + c.weight_decay * parameter;
}

// What torch.nn.utils.clip_grad_norm_ multiplies gradients by; not a number where the norm is none.
FASTBERT_HOST_DEVICE float clip_factor(float norm, float max_norm) {
  const float factor = max_norm / (norm + 1e-6f);
  return factor > 1.0f ? 1.0f : factor;
}

FASTBERT_HOST_DEVICE float trust_ratio(double parameter_squares, double direction_squares) {
  const bool both = parameter_squares > 0.0 && direction_squares > 0.0;
  return both ? static_cast<float>(sqrt(parameter_squares / direction_squares)) : 1.0f;
}

}  // namespace fastbert::cuda
