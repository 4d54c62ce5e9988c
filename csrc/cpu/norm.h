// A batch norm, as the schemas spell it and as the kernels read it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "cpu/elementwise.h"
#include "cpu/rows.h"

namespace fused_resnet::cpu {

// (v - mean) * scale + shift
struct Affine {
  const float* mean = nullptr;  // null: there is no norm
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// (v - mean) / sqrt(var + eps) * weight + bias. Null are: mean and var, where there is no norm; weight for 1; bias for
// 0.
struct Norm {
  const float *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  double eps = 0.0;

  Norm() = default;
  Norm(const std::optional<torch::stable::Tensor>& mean, const std::optional<torch::stable::Tensor>& var,
       const std::optional<torch::stable::Tensor>& weight, const std::optional<torch::stable::Tensor>& bias, double eps)
      : mean(floats(mean)), var(floats(var)), weight(floats(weight)), bias(floats(bias)), eps(eps) {
    STD_TORCH_CHECK(!mean == !var, "a norm has both mean and var");
  }

  explicit operator bool() const { return mean != nullptr; }

  double inverse_deviation(std::int64_t c) const { return 1.0 / std::sqrt(static_cast<double>(var[c]) + eps); }

  // The same in `scale` and `shift`: a function of the norm alone, so that forward and backward have the same bits.
  Affine affine(const Grid& grid, float* scale, float* shift) const {
    if (!mean) return {};
    grid.for_channel_blocks([&](std::int64_t first, int n) {
      for (std::int64_t c = first; c < first + n; ++c) {
        scale[c] = static_cast<float>((weight ? weight[c] : 1.0f) * inverse_deviation(c));
        shift[c] = bias ? bias[c] : 0.0f;
      }
    });
    return {mean, scale, shift};
  }

 private:
  static const float* floats(const std::optional<torch::stable::Tensor>& t) {
    return static_cast<const float*>(data_or_null(t));
  }
};

}  // namespace fused_resnet::cpu
