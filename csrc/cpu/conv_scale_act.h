// Convolution, per-channel scale and shift, residual and activation in one pass, for inference.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fused_resnet::cpu {

// Whether this processor and build have a kernel: fp32 needs AVX-512, bf16 needs AMX.
bool conv_supported(int64_t dtype_bits);

// weight [K, C, R, S], fp32 or bf16 -> panels of 32 output channels, filled up with zeros. `lasting`: for many calls.
torch::stable::Tensor conv_pack(const torch::stable::Tensor& weight, bool lasting);

// out = act(conv(x, weight) * scale + shift + residual), accumulated and finished in fp32; `residual` may be `out`.
// geometry: kernel, stride, padding and dilation, each (height, width).
void conv_scale_act(const torch::stable::Tensor& x, const torch::stable::Tensor& packed,
                    const torch::stable::Tensor& scale, const torch::stable::Tensor& shift,
                    const std::optional<torch::stable::Tensor>& residual, std::vector<int64_t> geometry, int64_t act,
                    torch::stable::Tensor out);

}  // namespace fused_resnet::cpu
