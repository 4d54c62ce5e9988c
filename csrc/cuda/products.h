// How tensor cores multiply fp32.
#pragma once

#include "cuda/device.h"

namespace fused_resnet::cuda {

// 16 bits as they are; fp32 rounded to TF32; or full fp32, as the sum of a TF32 and of what that leaves of it. Of fp32,
// sums that are not finite have to be taken again: the largest numbers round to an infinite TF32, which a zero makes
// NaN, and an infinity has no low part.
enum class Products { kHalf, kTf32, kFp32 };

FUSED_RESNET_DEVICE std::uint32_t high_part(std::uint32_t bits) {
  return to_tf32(as_float(bits));
}

FUSED_RESNET_DEVICE std::uint32_t low_part(std::uint32_t bits) {
  return to_tf32(as_float(bits) - as_float(high_part(bits)));
}

// acc += a * b of full fp32, of the parts of a and of whole b: three of the four products of two sums, the small ones
// first. Tensor cores cut their sums off instead of rounding them (Fasi et al. 2021, doi 10.7717/peerj-cs.330), which
// over a deep sum costs digits: it is taken outside of them (Ootomo & Yokota 2022, arXiv:2203.03341).
FUSED_RESNET_DEVICE void mma_fp32(float (&acc)[4], const std::uint32_t (&high)[4], const std::uint32_t (&low)[4],
                                  std::uint32_t b0, std::uint32_t b1) {
  float sum[4] = {};
  mma_tf32(sum, low, high_part(b0), high_part(b1));
  mma_tf32(sum, high, low_part(b0), low_part(b1));
  mma_tf32(sum, high, high_part(b0), high_part(b1));
#pragma unroll
  for (int e = 0; e < 4; ++e)
    acc[e] += sum[e];
}

}  // namespace fused_resnet::cuda
