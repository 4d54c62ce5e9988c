// The gradient of a convolution's weight, from its input before batch norm and activation where there are some.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fused_resnet::cpu {

// dweight[k, c, r, s] = sum_{n, p, q} dy[n, k, p, q] y[n, c, p * stride + r * dilation - padding, ...]
// with y = act((x - mean) / sqrt(var + eps) * weight + bias), or x where mean is absent; y is 0 in the padding.
// dy and x: dense channels_last, fp32. geometry: kernel, stride, padding and dilation, each (height, width).
void conv_wgrad(const torch::stable::Tensor& dy, const torch::stable::Tensor& x,
                const std::optional<torch::stable::Tensor>& mean, const std::optional<torch::stable::Tensor>& var,
                const std::optional<torch::stable::Tensor>& weight, const std::optional<torch::stable::Tensor>& bias,
                double eps, int64_t act, std::vector<int64_t> geometry, torch::stable::Tensor dweight);

}  // namespace fused_resnet::cpu
