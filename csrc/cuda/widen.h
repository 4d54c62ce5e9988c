// The elements of a pack as floats and back. In 16 bits two of them stay in one register, where conversions one by one
// would take, and keep, a register each.
#pragma once

#include "cuda/device.h"

namespace fused_resnet::cuda {

// Element e of a pack.
template <class T, int kN>
FUSED_RESNET_DEVICE float widen(const Pack<T, kN>& pack, int e) {
#if !defined(FUSED_RESNET_EMULATED)
  if constexpr (std::is_same_v<T, Bf16> && kN % 2 == 0) {
    std::uint32_t two;
    memcpy(&two, &pack.data[e / 2 * 2], sizeof(two));
    return as_float(e % 2 ? two & 0xffff0000u : two << 16);
  }
#endif
  return static_cast<float>(pack.data[e]);
}

#if !defined(FUSED_RESNET_EMULATED)
template <class T>
FUSED_RESNET_DEVICE std::uint32_t narrow_two(float low, float high) {
  std::uint32_t two;
  if constexpr (std::is_same_v<T, Bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(two) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
#endif

// Rounds to the nearest T, ties to even.
template <class T, int kN>
FUSED_RESNET_DEVICE Pack<T, kN> narrow(const float (&values)[kN]) {
  Pack<T, kN> pack;
#if defined(FUSED_RESNET_EMULATED)
  constexpr bool kTwo = false;
#else
  constexpr bool kTwo = !std::is_same_v<T, float> && kN % 2 == 0;
#endif
#pragma unroll
  for (int e = 0; e < kN; e += kTwo ? 2 : 1) {
    if constexpr (kTwo) {
      const std::uint32_t two = narrow_two<T>(values[e], values[e + 1]);
      memcpy(&pack.data[e], &two, sizeof(two));
    } else {
      pack.data[e] = static_cast<T>(values[e]);
    }
  }
  return pack;
}

}  // namespace fused_resnet::cuda
