// Merging the mean and M2, the sum of squared deviations, of two sets of numbers: Chan, Golub & LeVeque 1983.
#pragma once

#if defined(__CUDACC__)
#define FUSED_RESNET_BOTH __host__ __device__
#else
#define FUSED_RESNET_BOTH
#endif

namespace fused_resnet {

// Of a set of `before` numbers and one of `here` that is merged into it; neither depends on the numbers themselves.
template <class R>
struct MergeWeights {
  R fraction, weight;

  FUSED_RESNET_BOTH MergeWeights(R before, R here) : fraction(here / (before + here)), weight(fraction * before) {}

  // `delta` is the other set's mean less this one's.
  FUSED_RESNET_BOTH void merge(R& mean, R& m2, R delta, R other_m2) const {
    mean += delta * fraction;
    m2 += other_m2 + delta * delta * weight;
  }
};

}  // namespace fused_resnet

#undef FUSED_RESNET_BOTH
