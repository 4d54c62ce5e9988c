// What norm_act.cpp hands to its kernels. x, dy, y, residual and the outputs are all rows of `channels` elements; the
// vectors hold a float per channel.
#pragma once

#include <cstdint>

#include "cpu/norm.h"

namespace fused_resnet::cpu {

struct NormActArgs {
  const void* x = nullptr;
  const void* residual = nullptr;
  const void* dy = nullptr;
  const void* y = nullptr;
  void* out = nullptr;        // y; g of the sums, which may want none; dx
  void* dresidual = nullptr;  // with a norm of the residual's own
  std::int64_t channels = 0;
  int act = 0;
  bool bf16 = false;
  bool stream = false;  // write the outputs past the caches
  Affine norm, residual_norm;
  const float* mean_g = nullptr;  // dx = scale * (g - mean_g - (x - mean) * slope), and dresidual with its own slope
  const float* slope = nullptr;
  const float* residual_slope = nullptr;
};

// Where the sums of a tile go; of_residual is null without a norm of the residual's own.
struct GradientSums {
  float *of_g, *of_x, *of_residual;
};

}  // namespace fused_resnet::cpu
