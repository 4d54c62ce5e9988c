// What the training kernels share outside the instruction sets: the element types.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "act.h"

namespace fused_resnet::cpu {

struct Bf16 {
  std::uint16_t bits;
};

inline bool is_bf16(const torch::stable::Tensor& t) {
  return t.scalar_type() == torch::headeronly::ScalarType::BFloat16;
}

inline const void* data_or_null(const std::optional<torch::stable::Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

}  // namespace fused_resnet::cpu
