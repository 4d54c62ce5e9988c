// Batch norm + residual + activation in training: one element's formulas, and the passes of the backward, whose
// gradient comes from memory or through a max pooling. All arithmetic is in fp32.
#pragma once

#include <limits>

#include "cuda/norm.h"

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
  NormVectors norm, residual_norm;
  const float *dweight = nullptr, *dbias = nullptr, *dresidual_weight = nullptr;
  float* partials = nullptr;
  float inverse_count = 0.0f;  // of the values of a channel
  Limits limits;
};

// What all passes have in common.
template <class T>
BnArgs<T> bn_args(const Normed& source, std::int64_t act) {
  BnArgs<T> in{.limits = Limits(act)};
  in.x = static_cast<const T*>(source.x.const_data_ptr());
  in.residual = static_cast<const T*>(data_or_null(source.residual));
  in.norm = source.norm.vectors();
  in.residual_norm = source.residual_norm.vectors();
  return in;
}

template <class T>
void write_to(T*& pointer, const std::optional<Tensor>& t) {
  pointer = t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// The gradients of the channels' vectors, as the second pass reads them.
struct ChannelGradients {
  Tensor dweight, dbias;
  std::optional<Tensor> dresidual_weight;
  double count;

  void check(const Arguments& args, std::int64_t channels) const {
    args.vector(dweight, channels, "dweight");
    args.vector(dbias, channels, "dbias");
    args.vector(dresidual_weight, channels, "dresidual_weight");
    if (!(count >= 1.0)) args.refuse("count", std::to_string(count), "a number from 1 on");
  }

  template <class T>
  void hand_to(BnArgs<T>& in) const {
    in.dweight = floats(dweight);
    in.dbias = floats(dbias);
    in.dresidual_weight = floats(dresidual_weight);
    in.inverse_count = static_cast<float>(1.0 / count);
  }
};

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
template <class T, int kN, Slope kSlope, int kAct, bool kNormed, class Source>
struct GradientRow {
  typename Source::Loaded dy;
  Pack<T, kN> x, y, residual;
  unsigned bits;

  FUSED_RESNET_DEVICE void load(const BnArgs<T>& in, const Source& source, const RowTile& tile, const RowGrid& grid,
                                std::int64_t row) {
    const std::int64_t at = row * grid.channels + tile.channel;
    x = load_pack<T, kN>(in.x + at);
    dy = source.load(tile, grid, row);
    if constexpr (kSlope == Slope::kMask) bits = in.mask[at / kN];
    if constexpr (kSlope == Slope::kOutput) y = load_pack<T, kN>(in.y + at);
    if constexpr (kNormed)
      residual = load_pack<T, kN>(in.residual + at);
    else if constexpr (kSlope == Slope::kAgain)
      if (in.residual) residual = load_pack<T, kN>(in.residual + at);
  }

  FUSED_RESNET_DEVICE float g(int e, const BnArgs<T>& in, const PreActivation<kN, kNormed>& norms) const {
    const float g = dy(e);
    if constexpr (kSlope == Slope::kOne) return g;
    if constexpr (kSlope == Slope::kMask) return bits >> e & 1 ? g : 0.0f;
    if constexpr (kSlope == Slope::kOutput) return passes(widen(y, e), in.limits) ? g : 0.0f;
    const float v = widen(x, e);
    const float pre = kNormed || in.residual ? norms(e, v, widen(residual, e)) : norms.x(e, v);
    if constexpr (kAct != kNone) return activate_grad<kAct>(g, pre);
    return passes(static_cast<float>(static_cast<T>(pre)), in.limits) ? g : 0.0f;
  }
};

// Rows of a thread in flight, and blocks of a multiprocessor, without a spill: the vectors of a second norm take the
// registers of two rows, and of one more where the pre-activation is computed again.
template <class Source, Slope kSlope, bool kNormed>
constexpr int kRowsAtOnce = !kNormed                  ? Source::kAtOnce
                            : kSlope == Slope::kAgain ? 1
                                                      : 2;

template <Slope kSlope, bool kNormed>
constexpr int kBlocksPerSm = kSlope == Slope::kOne && !kNormed ? 3 : 2;

// partials[tile] = the sums of g, of g * (x - mean) and, kNormed, of g * (residual - its mean) over the tile; out = g.
template <class T, int kN, Slope kSlope, int kAct, bool kNormed, class Source>
__global__ void __launch_bounds__(RowGrid::kThreads, kBlocksPerSm<kSlope, kNormed>)
    bn_reduce_kernel(BnArgs<T> in, Source source, RowGrid grid) {
  constexpr int kSums = kNormed ? 3 : 2;
  const RowTile tile(grid, kN);
  const PreActivation<kN, kNormed> norms(in.norm, in.residual_norm, tile);
  float sums[kSums * kN] = {};
  for_rows<kRowsAtOnce<Source, kSlope, kNormed>>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    GradientRow<T, kN, kSlope, kAct, kNormed, Source> a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a[i].load(in, source, tile, grid, row + i * tile.lines);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float g[kN];
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        g[e] = a[i].g(e, in, norms);
        sums[e] += g[e];
        sums[kN + e] += g[e] * (widen(a[i].x, e) - norms.x.mean[e]);
        if constexpr (kNormed) sums[2 * kN + e] += g[e] * (widen(a[i].residual, e) - norms.residual.mean[e]);
      }
      if (in.out) store_global(in.out + (row + i * tile.lines) * grid.channels + tile.channel, narrow<T>(g));
    }
  });
  merge_lines(tile, sums, [](float (&own)[kSums* kN], const float (&other)[kSums* kN], int) {
#pragma unroll
    for (int v = 0; v < kSums * kN; ++v)
      own[v] += other[v];
  });
  if (tile.line != 0 || !tile.inside) return;
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
    float sum[kN];
#pragma unroll
    for (int e = 0; e < kN; ++e)
      sum[e] = sums[which * kN + e];
    store_channels(in.partials + (tile.index * kSums + which) * grid.channels + tile.channel, sum);
  }
}

// batch_norm_grad's slope, the mean of g * (x - mean) over the variance, of dweight, the sum of g * (x - mean) *
// inverse.
template <int kN>
FUSED_RESNET_DEVICE void load_slope(float (&slope)[kN], const Affine<kN>& norm, const float* dweight,
                                    std::int64_t channel, float inverse_count) {
  load_channels(slope, dweight, channel, 0.0f);
#pragma unroll
  for (int e = 0; e < kN; ++e)
    slope[e] *= norm.inverse[e] * inverse_count;
}

// out = dx = scale * (g - mean_g - (x - mean) * slope) and, kNormed, dresidual the same, the tiles in the opposite
// order of bn_reduce_kernel's.
template <class T, int kN, Slope kSlope, int kAct, bool kNormed, class Source>
__global__ void __launch_bounds__(RowGrid::kThreads, kBlocksPerSm<kSlope, kNormed>)
    bn_input_grad_kernel(BnArgs<T> in, Source source, RowGrid grid) {
  const RowTile tile(grid, kN, true);
  if (!tile.inside) return;
  const PreActivation<kN, kNormed> norms(in.norm, in.residual_norm, tile);
  float mean_g[kN], slope[kN];
  [[maybe_unused]] float residual_slope[kN];
  load_channels(mean_g, in.dbias, tile.channel, 0.0f);
#pragma unroll
  for (int e = 0; e < kN; ++e)
    mean_g[e] *= in.inverse_count;
  load_slope(slope, norms.x, in.dweight, tile.channel, in.inverse_count);
  if constexpr (kNormed)
    load_slope(residual_slope, norms.residual, in.dresidual_weight, tile.channel, in.inverse_count);
  for_rows<kRowsAtOnce<Source, kSlope, kNormed>>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    GradientRow<T, kN, kSlope, kAct, kNormed, Source> a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a[i].load(in, source, tile, grid, row + i * tile.lines);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i * tile.lines) * grid.channels + tile.channel;
      float dx[kN];
      [[maybe_unused]] float dresidual[kN];
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        const float g = a[i].g(e, in, norms);
        dx[e] = batch_norm_grad(g, widen(a[i].x, e) - norms.x.mean[e], norms.x.scale[e], mean_g[e], slope[e]);
        if constexpr (kNormed)
          dresidual[e] = batch_norm_grad(g, widen(a[i].residual, e) - norms.residual.mean[e], norms.residual.scale[e],
                                         mean_g[e], residual_slope[e]);
      }
      store_global(in.out + at, narrow<T>(dx));
      if constexpr (kNormed) store_global(in.dresidual + at, narrow<T>(dresidual));
    }
  });
}

// Launches the first pass of the backward where there are partials to write, else the second.
template <int kN, Slope kSlope, int kAct, bool kNormed, class T, class Source>
void launch_bn_backward(const Launcher& launch, const BnArgs<T>& in, const Source& source, const RowGrid& grid) {
  if (in.partials)
    launch(bn_reduce_kernel<T, kN, kSlope, kAct, kNormed, Source>, grid.blocks(), RowGrid::kThreads,
           merge_memory((kNormed ? 3 : 2) * kN), in, source, grid);
  else
    launch(bn_input_grad_kernel<T, kN, kSlope, kAct, kNormed, Source>, grid.blocks(), RowGrid::kThreads, 0, in, source,
           grid);
}

}  // namespace fused_resnet::cuda
