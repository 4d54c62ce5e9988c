// The end of every convolution: out = act(sum * scale + shift + residual), in fp32.
#pragma once

#include "cuda/widen.h"

namespace fused_resnet::cuda {

template <int kN>
FUSED_RESNET_DEVICE void activate_all(float (&v)[kN], int act) {
  for_act(act, [&](auto code) {
#pragma unroll
    for (int e = 0; e < kN; ++e)
      v[e] = activate<code()>(v[e]);
  });
}

// act(sum * scale + shift + residual), rounded to T; residual[e] is a float.
template <class T, int kN, class Residual>
FUSED_RESNET_DEVICE Pack<T, kN> finish(float (&v)[kN], const float (&scale)[kN], const float (&shift)[kN],
                                       const Residual& residual, int act) {
#pragma unroll
  for (int e = 0; e < kN; ++e)
    v[e] = v[e] * scale[e] + shift[e] + residual[e];
  activate_all(v, act);
  Pack<T, kN> rounded;
#pragma unroll
  for (int e = 0; e < kN; ++e)
    rounded.data[e] = static_cast<T>(v[e]);
  return rounded;
}

}  // namespace fused_resnet::cuda
