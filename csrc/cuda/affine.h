// The end of every convolution: out = act(sum * scale + shift + residual), in fp32.
#pragma once

#include "cuda/device.h"

namespace fused_resnet::cuda {

template <int kAct, int kN>
FUSED_RESNET_DEVICE void activate_each(float (&v)[kN]) {
#pragma unroll
  for (int e = 0; e < kN; ++e)
    v[e] = activate<kAct>(v[e]);
}

// The activation is known at the launch only, and the same for all threads: one branch for kN elements.
template <int kN>
FUSED_RESNET_DEVICE void activate_any(float (&v)[kN], int act) {
  switch (act) {
    case kRelu:
      return activate_each<kRelu>(v);
    case kRelu6:
      return activate_each<kRelu6>(v);
    case kHardswish:
      return activate_each<kHardswish>(v);
    case kSilu:
      return activate_each<kSilu>(v);
    default:
      return;
  }
}

// kN values of a per-channel vector from c on, a multiple of kN, or `otherwise` where there is none.
template <int kN>
FUSED_RESNET_DEVICE void load_vector(float (&to)[kN], const float* vector, int c, float otherwise) {
  constexpr int kAccess = kN < 4 ? kN : 4;
#pragma unroll
  for (int e = 0; e < kN; e += kAccess) {
    Pack<float, kAccess> pack;
    if (vector) pack = load_pack<float, kAccess>(vector + c + e);
#pragma unroll
    for (int i = 0; i < kAccess; ++i)
      to[e + i] = vector ? pack.data[i] : otherwise;
  }
}

// The elements of a pack as floats.
template <class T, int kN>
struct Widened {
  Pack<T, kN> pack;

  FUSED_RESNET_DEVICE float operator[](int e) const { return static_cast<float>(pack.data[e]); }
};

// act(sum * scale + shift + residual), rounded to T; residual[e] is a float.
template <class T, int kN, class Residual>
FUSED_RESNET_DEVICE Pack<T, kN> finish(float (&v)[kN], const float (&scale)[kN], const float (&shift)[kN],
                                       const Residual& residual, int act) {
#pragma unroll
  for (int e = 0; e < kN; ++e)
    v[e] = v[e] * scale[e] + shift[e] + residual[e];
  activate_any(v, act);
  Pack<T, kN> rounded;
#pragma unroll
  for (int e = 0; e < kN; ++e)
    rounded.data[e] = static_cast<T>(v[e]);
  return rounded;
}

}  // namespace fused_resnet::cuda
