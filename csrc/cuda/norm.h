// A batch norm: its tensors as an operator gets them, its vectors as a kernel does, and in a thread's registers.
#pragma once

#include "cuda/launch.h"
#include "cuda/rows.h"

namespace fused_resnet::cuda {

// Null: 0 for mean and bias, 1 for weight, and without var nothing is divided by a deviation.
struct NormVectors {
  const float *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  float eps = 0.0f;
};

struct Norm {
  using Names = const char* const[4];
  static constexpr Names kOwn = {"mean", "var", "weight", "bias"};
  static constexpr Names kResiduals = {"residual_mean", "residual_var", "residual_weight", "residual_bias"};

  std::optional<Tensor> mean, var, weight, bias;
  double eps = 0.0;

  NormVectors vectors() const {
    return {floats(mean), floats(var), floats(weight), floats(bias), static_cast<float>(eps)};
  }

  void check(const Arguments& args, std::int64_t channels, const Names& names) const {
    args.given(mean, names[0], "a number for each channel");
    args.given(var, names[1], "a number for each channel");
    args.vector(mean, channels, names[0]);
    args.vector(var, channels, names[1]);
    args.vector(weight, channels, names[2]);
    args.vector(bias, channels, names[3]);
  }
};

// What batch norm and its gradient read: x with its norm, and a residual that may have one of its own.
struct Normed {
  Tensor x;
  Norm norm;
  std::optional<Tensor> residual;
  Norm residual_norm;

  bool has_residual_norm() const { return residual_norm.mean.has_value(); }

  void check(const Arguments& args) const {
    args.image(x, "x");
    norm.check(args, x.size(1), Norm::kOwn);
    args.like(residual, x, "residual");
    const Norm& other = residual_norm;
    if (!other.mean && !other.var && !other.weight && !other.bias) return;
    args.given(residual, "residual", "what residual_mean is the mean of");
    other.check(args, x.size(1), Norm::kResiduals);
  }
};

// Of kN channels: (x - mean) * scale + shift, scale = weight * inverse, inverse = 1 / sqrt(var + eps). Forward and
// backward compute it here, so that the backward finds the forward's pieces of the activation to the bit.
template <int kN>
struct Affine {
  float mean[kN], inverse[kN], scale[kN], shift[kN];

  FUSED_RESNET_DEVICE Affine(const NormVectors& norm, const RowTile& tile) {
    if (!tile.inside) return;
    load_channels(mean, norm.mean, tile.channel, 0.0f);
    load_channels(inverse, norm.var, tile.channel, 1.0f);
    load_channels(scale, norm.weight, tile.channel, 1.0f);
    load_channels(shift, norm.bias, tile.channel, 0.0f);
    if (!norm.var) return;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      inverse[e] = 1.0f / std::sqrt(inverse[e] + norm.eps);
      scale[e] *= inverse[e];
    }
  }

  FUSED_RESNET_DEVICE float operator()(int e, float x) const { return batch_norm(x - mean[e], scale[e], shift[e]); }
};

struct NoAffine {
  FUSED_RESNET_DEVICE NoAffine(const NormVectors&, const RowTile&) {}
};

// The pre-activation of kN channels, of x and, kNormed, of a residual that has a norm too.
template <int kN, bool kNormed>
struct PreActivation {
  Affine<kN> x;
  std::conditional_t<kNormed, Affine<kN>, NoAffine> residual;

  FUSED_RESNET_DEVICE PreActivation(const NormVectors& norm, const NormVectors& residual_norm, const RowTile& tile)
      : x(norm, tile), residual(residual_norm, tile) {}

  FUSED_RESNET_DEVICE float operator()(int e, float x_value, float residual_value) const {
    if constexpr (kNormed)
      return x(e, x_value) + residual(e, residual_value);
    else
      return x(e, x_value) + residual_value;
  }
};

}  // namespace fused_resnet::cuda
