// What the training kernels share outside the instruction sets: element types, activation codes, memory hints.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// A fresh output of many megabytes costs more in page faults, one for 4 KB, than in its writes: ask for 2 MB pages.
inline void* writable(const torch::stable::Tensor& t) {
  void* data = t.mutable_data_ptr();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
  const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(t.numel()) * t.element_size()) & ~(kHuge - 1);
  if (last > first + kHuge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
  return data;
}

}  // namespace fused_resnet::cpu
