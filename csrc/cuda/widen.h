// What lies in memory as floats, and back. In 16 bits two elements stay in one register, where conversions one by one
// would take, and keep, a register each.
#pragma once

#include "cuda/device.h"

namespace fused_resnet::cuda {

// The lower or the upper 16 bits of a word.
template <class T>
FUSED_RESNET_DEVICE float widen_half(std::uint32_t word, bool upper) {
  if constexpr (std::is_same_v<T, Bf16>) return as_float(upper ? word & 0xffff0000u : word << 16);
  return static_cast<float>(Half(static_cast<std::uint16_t>(upper ? word >> 16 : word), Half::from_bits()));
}

// Element e of a pack.
template <class T, int kN>
FUSED_RESNET_DEVICE float widen(const Pack<T, kN>& pack, int e) {
  if constexpr (sizeof(T) == 2 && kN % 2 == 0) {
    std::uint32_t two;
    memcpy(&two, &pack.data[e / 2 * 2], sizeof(two));
    return widen_half<T>(two, e % 2);
  }
  return static_cast<float>(pack.data[e]);
}

// kN elements of T as they lie in memory: words that stay whole until they are used. As elements, 16-bit ones would
// each take a register from the load on.
template <class T, int kN>
struct Raw {
  static constexpr int kBytes = kN * static_cast<int>(sizeof(T));
  using Word = std::conditional_t<kBytes % 4 == 0, std::uint32_t, std::uint16_t>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Pack<Word, kWords> words{};

  FUSED_RESNET_DEVICE void load(const T* pointer) {
    words = load_pack<Word, kWords>(reinterpret_cast<const Word*>(pointer));
  }

  FUSED_RESNET_DEVICE float operator[](int e) const {
    if constexpr (sizeof(T) == 4)
      return as_float(words.data[e]);
    else
      return widen_half<T>(words.data[e * 2 / static_cast<int>(sizeof(Word))], e % 2);
  }
};

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

// kN values of a per-channel vector from `channel` on, a multiple of kN; `otherwise` where there is none.
template <int kN, class Index>
FUSED_RESNET_DEVICE void load_channels(float (&out)[kN], const float* vector, Index channel, float otherwise) {
  constexpr int kPack = kN < 4 ? kN : 4;
#pragma unroll
  for (int i = 0; i < kN; i += kPack) {
    Pack<float, kPack> pack;
    if (vector) pack = load_pack<float, kPack>(vector + channel + i);
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      out[i + e] = vector ? pack.data[e] : otherwise;
  }
}

template <int kN>
FUSED_RESNET_DEVICE void store_channels(float* vector, const float (&values)[kN]) {
  constexpr int kPack = kN < 4 ? kN : 4;
#pragma unroll
  for (int i = 0; i < kN; i += kPack) {
    Pack<float, kPack> pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e)
      pack.data[e] = values[i + e];
    store_global(vector + i, pack);
  }
}

}  // namespace fused_resnet::cuda
