// Mean and variance of a tile of rows of a channel, as a kernel leaves them for those who merge the tiles.
#pragma once

#include "cuda/device.h"

namespace fused_resnet::cuda {

// What lies in memory, partials [tiles, 3, channels]. The mean is the sum of two floats, high and low: with a mean a
// million deviations away from zero, the differences of two tiles' means are still exact to the bits that count. The
// variance, and not the sum of squares, because that overflows earlier.
struct PartialMoments {
  float high, low, variance;

  FUSED_RESNET_DEVICE PartialMoments(double mean, double variance)
      : high(static_cast<float>(mean)),
        low(is_finite(high) ? static_cast<float>(mean - high) : 0.0f),
        variance(static_cast<float>(variance)) {}

  // What the kernels sum up in fp32 must be taken again where it is not. Nothing that overflows there ends up finite.
  FUSED_RESNET_DEVICE bool finite() const { return is_finite(high) && is_finite(variance); }

  FUSED_RESNET_DEVICE void store(float* partials, std::int64_t channels) const {
    partials[0] = high;
    partials[channels] = low;
    partials[2 * channels] = variance;
  }

  // Of rows at(0), ..., at(count - 1), in fp64, where no sum of finite floats overflows; the mean of Inf is Inf.
  template <class At>
  FUSED_RESNET_DEVICE static PartialMoments taken_again(std::int64_t count, const At& at) {
    double sum = 0.0, m2 = 0.0;
#pragma unroll 1
    for (std::int64_t i = 0; i < count; ++i)
      sum += static_cast<double>(at(i));
    const double mean = sum / static_cast<double>(count);
#pragma unroll 1
    for (std::int64_t i = 0; i < count; ++i) {
      const double d = static_cast<double>(at(i)) - mean;
      m2 += d * d;
    }
    return {mean, m2 / static_cast<double>(count)};
  }
};

// The moments of `count` rows, x = centre + d, while they are summed up in fp32: where one of them is not finite, they
// say no more than that.
struct TileMoments {
  float count = 0.0f, high = 0.0f, low = 0.0f, m2 = 0.0f;

  // d has this mean and M2.
  FUSED_RESNET_DEVICE static TileMoments about(float centre, float count, float mean, float m2) {
    const float high = centre + mean;
    return {count, high, mean - (high - centre), m2};
  }

  FUSED_RESNET_DEVICE void merge(const TileMoments& other) {
    if (other.count == 0.0f) return;
    const MergeWeights<float> weights(count, other.count);
    const float before = high;
    float moved = 0.0f;
    weights.merge(moved, m2, (other.high - high) + (other.low - low), other.m2);
    high = before + (low + moved);
    low = (before - high) + (low + moved);
    count += other.count;
  }

  FUSED_RESNET_DEVICE PartialMoments partial() const {
    return {static_cast<double>(high) + static_cast<double>(low), static_cast<double>(m2 / count)};
  }
};

// The moments of rows at(0), ..., at(count - 1), taken of their differences to the first, which cancel nothing.
template <class At>
FUSED_RESNET_DEVICE TileMoments moments_of(int count, const At& at) {
  if (count <= 0) return {};
  const float centre = at(0);
  float sum = 0.0f, m2 = 0.0f;
  for (int i = 1; i < count; ++i)
    sum += at(i) - centre;
  const float mean = sum * (1.0f / static_cast<float>(count));
  for (int i = 0; i < count; ++i) {
    const float d = at(i) - centre - mean;
    m2 += d * d;
  }
  return TileMoments::about(centre, static_cast<float>(count), mean, m2);
}

}  // namespace fused_resnet::cuda
