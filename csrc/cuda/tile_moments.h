// Mean and M2 of some rows of a channel, as a kernel leaves them for those who merge the tiles.
#pragma once

#include "cuda/device.h"

namespace fused_resnet::cuda {

// The mean is the sum of two floats, high and low: with a mean a million deviations away from zero, the differences of
// two tiles' means are still exact to the bits that count.
struct TileMoments {
  float count = 0.0f, high = 0.0f, low = 0.0f, m2 = 0.0f;

  // Of x = centre + d, where d has this mean and M2.
  FUSED_RESNET_HOST_DEVICE static TileMoments about(float centre, float count, float mean, float m2) {
    TileMoments moments{count, centre + mean, 0.0f, m2};
    moments.low = is_finite(moments.high) ? mean - (moments.high - centre) : 0.0f;
    return moments;
  }

  FUSED_RESNET_HOST_DEVICE void merge(const TileMoments& other) {
    if (other.count == 0.0f) return;
    const MergeWeights<float> weights(count, other.count);
    const float before = high;
    float moved = 0.0f;
    weights.merge(moved, m2, (other.high - high) + (other.low - low), other.m2);
    high = before + (low + moved);
    low = is_finite(high) ? (before - high) + (low + moved) : 0.0f;
    count += other.count;
  }
};

// The moments of rows at(0), ..., at(count - 1), taken of their differences to the first, which cancel nothing. Where
// those are not numbers, as Inf - Inf, the mean is the plain one, and so Inf where aten's is.
template <class At>
FUSED_RESNET_HOST_DEVICE TileMoments moments_of(int count, const At& at) {
  if (count <= 0) return {};
  const float centre = at(0), inverse = 1.0f / static_cast<float>(count);
  float sum = 0.0f;
  for (int i = 1; i < count; ++i)
    sum += at(i) - centre;
  const float mean = sum * inverse;
  if (!is_finite(mean)) {
    float plain = 0.0f;
    for (int i = 0; i < count; ++i)
      plain += at(i);
    return {static_cast<float>(count), plain * inverse, 0.0f, plain - plain};
  }
  float m2 = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float d = at(i) - centre - mean;
    m2 += d * d;
  }
  return TileMoments::about(centre, static_cast<float>(count), mean, m2);
}

}  // namespace fused_resnet::cuda
