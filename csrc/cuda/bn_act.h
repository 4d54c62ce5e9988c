// Batch norm + residual + activation in training: one element's formulas, and the passes of the backward, whose
// gradient comes from memory or through a max pooling. All arithmetic is in fp32.
#pragma once

#include <limits>

#include "cuda/launch.h"
#include "cuda/rows.h"

namespace fused_resnet::cuda {

// What an activation clamps to; NaN limits nothing. So one kernel does for none, ReLU and ReLU6, under the name kNone.
struct Limits {
  float low, high;

  explicit Limits(std::int64_t act)
      : low(act == kRelu || act == kRelu6 ? 0.0f : std::numeric_limits<float>::quiet_NaN()),
        high(act == kRelu6 ? 6.0f : std::numeric_limits<float>::quiet_NaN()) {}
};

// What the passes read and write, [rows, channels] and per channel; null where a problem does not have it.
template <class T>
struct BnArgs {
  const T *x = nullptr, *dy = nullptr, *y = nullptr, *residual = nullptr;
  T *out = nullptr, *dresidual = nullptr;
  std::uint8_t* mask = nullptr;
  const float *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  const float *mean_g = nullptr, *slope = nullptr;
  float* partials = nullptr;
  float eps = 0.0f;
  Limits limits;
};

// What all passes have in common.
template <class T>
BnArgs<T> bn_args(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& mean,
                  const std::optional<Tensor>& var, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps, std::int64_t act) {
  BnArgs<T> in{.limits = Limits(act)};
  in.x = static_cast<const T*>(x.const_data_ptr());
  in.residual = static_cast<const T*>(data_or_null(residual));
  in.mean = floats(mean);
  in.var = floats(var);
  in.weight = floats(weight);
  in.bias = floats(bias);
  in.eps = static_cast<float>(eps);
  return in;
}

template <int kAct>
FUSED_RESNET_DEVICE float limited_activate(float v, Limits limits) {
  if constexpr (kAct != kNone) return activate<kAct>(v);
  v = v < limits.low ? limits.low : v;
  return v > limits.high ? limits.high : v;
}

// Whether a clamp lets the gradient pass, told from its output; NaN lets it.
FUSED_RESNET_DEVICE bool passes(float at, Limits limits) {
  return !(at <= limits.low) && !(at >= limits.high);
}

// Of kN channels: (x - mean) * scale + shift, scale = weight / sqrt(var + eps), or the weight where there is no var.
// Forward and backward compute it here, so that the backward finds the forward's pieces of the activation to the bit.
template <int kN>
struct Affine {
  float mean[kN], scale[kN], shift[kN];

  template <class T>
  FUSED_RESNET_DEVICE Affine(const BnArgs<T>& in, const RowTile& tile) {
    if (!tile.inside) return;
    load_channels(mean, in.mean, tile.channel, 0.0f);
    load_channels(scale, in.weight, tile.channel, 1.0f);
    load_channels(shift, in.bias, tile.channel, 0.0f);
    if (!in.var) return;
    float var[kN];
    load_channels(var, in.var, tile.channel, 1.0f);
#pragma unroll
    for (int e = 0; e < kN; ++e)
      scale[e] *= 1.0f / std::sqrt(var[e] + in.eps);
  }

  FUSED_RESNET_DEVICE float operator()(int e, float x) const { return batch_norm(x - mean[e], scale[e], shift[e]); }
};

// Where the activation's slope is told from: it is 1; a bit an element; the output; the pre-activation, computed again.
enum class Slope { kOne, kMask, kOutput, kAgain };

// dy as it lies in memory.
template <class T, int kN>
struct StoredGradient {
  static constexpr int kAtOnce = RowGrid::kAtOnce;
  const T* dy;

  struct Loaded {
    Pack<T, kN> pack;
    FUSED_RESNET_DEVICE float operator()(int e) const { return widen(pack, e); }
  };
  FUSED_RESNET_DEVICE Loaded load(const RowTile& tile, const RowGrid& grid, std::int64_t row) const {
    return {load_pack<T, kN>(dy + row * grid.channels + tile.channel)};
  }
};

// One row of a thread: what is loaded of it, and g = dy * act' from that.
template <class T, int kN, Slope kSlope, int kAct, class Source>
struct GradientRow {
  typename Source::Loaded dy;
  Pack<T, kN> x, other;  // the output, or the residual
  unsigned bits;

  FUSED_RESNET_DEVICE void load(const BnArgs<T>& in, const Source& source, const RowTile& tile, const RowGrid& grid,
                                std::int64_t row) {
    const std::int64_t at = row * grid.channels + tile.channel;
    x = load_pack<T, kN>(in.x + at);
    dy = source.load(tile, grid, row);
    if constexpr (kSlope == Slope::kMask) bits = in.mask[at / kN];
    if constexpr (kSlope == Slope::kOutput) other = load_pack<T, kN>(in.y + at);
    if constexpr (kSlope == Slope::kAgain)
      if (in.residual) other = load_pack<T, kN>(in.residual + at);
  }

  FUSED_RESNET_DEVICE float centred(int e, const Affine<kN>& affine) const { return widen(x, e) - affine.mean[e]; }

  FUSED_RESNET_DEVICE float g(int e, const BnArgs<T>& in, const Affine<kN>& affine) const {
    const float g = dy(e);
    if constexpr (kSlope == Slope::kOne) return g;
    if constexpr (kSlope == Slope::kMask) return bits >> e & 1 ? g : 0.0f;
    if constexpr (kSlope == Slope::kOutput) return passes(widen(other, e), in.limits) ? g : 0.0f;
    float pre = affine(e, widen(x, e));
    if (in.residual) pre += widen(other, e);
    if constexpr (kAct != kNone) return activate_grad<kAct>(g, pre);
    return passes(static_cast<float>(static_cast<T>(pre)), in.limits) ? g : 0.0f;
  }
};

// partials[tile] = the sums of g and of g * (x - mean) over the tile; dresidual = g.
template <class T, int kN, Slope kSlope, int kAct, class Source>
__global__ void __launch_bounds__(RowGrid::kThreads, kSlope == Slope::kOne ? 3 : 2)
    bn_reduce_kernel(BnArgs<T> in, Source source, RowGrid grid) {
  const RowTile tile(grid, kN);
  const Affine<kN> affine(in, tile);
  float sums[2 * kN] = {};
  for_rows<Source::kAtOnce>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    GradientRow<T, kN, kSlope, kAct, Source> a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a[i].load(in, source, tile, grid, row + i * tile.lines);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float g[kN];
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        g[e] = a[i].g(e, in, affine);
        sums[e] += g[e];
        sums[kN + e] += g[e] * a[i].centred(e, affine);
      }
      if (in.dresidual)
        store_global(in.dresidual + (row + i * tile.lines) * grid.channels + tile.channel, narrow<T>(g));
    }
  });
  merge_lines(tile, sums, [](float (&own)[2 * kN], const float (&other)[2 * kN], int) {
#pragma unroll
    for (int v = 0; v < 2 * kN; ++v)
      own[v] += other[v];
  });
  if (tile.line != 0 || !tile.inside) return;
  float* out = in.partials + tile.index * 2 * grid.channels + tile.channel;
  float sum_g[kN], sum_gx[kN];
#pragma unroll
  for (int e = 0; e < kN; ++e)
    sum_g[e] = sums[e], sum_gx[e] = sums[kN + e];
  store_channels(out, sum_g);
  store_channels(out + grid.channels, sum_gx);
}

// out = dx = scale * (g - mean_g - (x - mean) * slope), the tiles in the opposite order of bn_reduce_kernel's.
template <class T, int kN, Slope kSlope, int kAct, class Source>
__global__ void __launch_bounds__(RowGrid::kThreads, kSlope == Slope::kOne ? 3 : 2)
    bn_input_grad_kernel(BnArgs<T> in, Source source, RowGrid grid) {
  const RowTile tile(grid, kN, true);
  if (!tile.inside) return;
  const Affine<kN> affine(in, tile);
  float mean_g[kN], slope[kN];
  load_channels(mean_g, in.mean_g, tile.channel, 0.0f);
  load_channels(slope, in.slope, tile.channel, 0.0f);
  for_rows<Source::kAtOnce>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    GradientRow<T, kN, kSlope, kAct, Source> a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a[i].load(in, source, tile, grid, row + i * tile.lines);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float dx[kN];
#pragma unroll
      for (int e = 0; e < kN; ++e)
        dx[e] = batch_norm_grad(a[i].g(e, in, affine), a[i].centred(e, affine), affine.scale[e], mean_g[e], slope[e]);
      store_global(in.out + (row + i * tile.lines) * grid.channels + tile.channel, narrow<T>(dx));
    }
  });
}

// Launches the first pass of the backward where there are partials to write, else the second.
template <int kN, Slope kSlope, int kAct, class T, class Source>
void launch_bn_backward(const Launcher& launch, const BnArgs<T>& in, const Source& source, const RowGrid& grid) {
  if (in.partials)
    launch(bn_reduce_kernel<T, kN, kSlope, kAct, Source>, grid.blocks(), RowGrid::kThreads, merge_memory(2 * kN), in,
           source, grid);
  else
    launch(bn_input_grad_kernel<T, kN, kSlope, kAct, Source>, grid.blocks(), RowGrid::kThreads, 0, in, source, grid);
}

}  // namespace fused_resnet::cuda
