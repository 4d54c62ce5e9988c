// What the training kernels share outside the instruction sets: element types, activation codes.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace fused_resnet::cpu {

struct Bf16 {
  std::uint16_t bits;
};

// As in fused_resnet/functional: the codes are part of the schemas.
enum Act : int { kNone = 0, kRelu = 1, kRelu6 = 2, kHardswish = 3, kSilu = 4 };

inline bool is_bf16(const torch::stable::Tensor& t) {
  return t.scalar_type() == torch::headeronly::ScalarType::BFloat16;
}

inline const void* data_or_null(const std::optional<torch::stable::Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

}  // namespace fused_resnet::cpu
