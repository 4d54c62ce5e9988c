#include "cpu/bn_act.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/elementwise.h"
#include "cpu/train.h"
#include "moments.h"

#define FUSED_RESNET_KERNELS "cpu/bn_act_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {
namespace {

using torch::stable::Tensor;

constexpr int kMergeBlock = portable::kMergeBlock;
constexpr std::int64_t kChannelPad = 16;
constexpr std::int64_t kTileElements = 1 << 14;  // small enough to give every thread work at 7 x 7
constexpr std::int64_t kStreamFrom = 1 << 20, kStreamBesideResidualFrom = 16 << 20;
constexpr std::int64_t kMaxRowTiles = 256;  // bounds the partial sums, which are merged on few threads

// Cuts rows x channels by their sizes alone, so that every sum has one order, whatever the number of threads.
struct Grid {
  std::int64_t rows, channels, padded, tile_rows, tile_channels, row_tiles, channel_tiles;

  explicit Grid(const Tensor& x) {
    channels = x.size(1);
    rows = channels ? x.numel() / channels : 0;
    if (rows == 0) return;
    padded = (channels + kChannelPad - 1) / kChannelPad * kChannelPad;
    tile_channels = std::min(channels, kTileChannels);
    tile_rows = std::max(kTileElements / tile_channels, (rows + kMaxRowTiles - 1) / kMaxRowTiles);
    tile_rows = (tile_rows + 7) / 8 * 8;
    row_tiles = (rows + tile_rows - 1) / tile_rows;
    channel_tiles = (channels + tile_channels - 1) / tile_channels;
  }

  bool empty() const { return rows == 0; }

  // Calls body(tile, index of its rows) for every tile. Backwards, each thread begins with what it read last.
  template <class Body>
  void for_tiles(bool backwards, const Body& body) const {
    torch::stable::parallel_for(0, row_tiles * channel_tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t item = backwards ? begin + end - 1 - i : i;
        const std::int64_t row_tile = item / channel_tiles;
        const std::int64_t row = row_tile * tile_rows, channel = item % channel_tiles * tile_channels;
        body(BnTile{row, std::min(tile_rows, rows - row), channel, std::min(tile_channels, channels - channel)},
             row_tile);
      }
    });
  }

  // Calls body(first channel, how many) for blocks of at most kMergeBlock channels.
  template <class Body>
  void for_channel_blocks(const Body& body) const {
    const std::int64_t grain = std::max<std::int64_t>(1, kTileElements / (row_tiles * kMergeBlock));
    torch::stable::parallel_for(
        0, (channels + kMergeBlock - 1) / kMergeBlock, grain, [&](std::int64_t b, std::int64_t e) {
          for (std::int64_t first = b * kMergeBlock; first < std::min(e * kMergeBlock, channels); first += kMergeBlock)
            body(first, static_cast<int>(std::min<std::int64_t>(kMergeBlock, channels - first)));
        });
  }
};

// `vectors` per-channel vectors of floats, and `partials` of them again for each tile of rows.
class Workspace {
 public:
  Workspace(const Grid& grid, int vectors, int partials)
      : padded_(grid.padded),
        vectors_(vectors),
        partials_(partials),
        data_(new float[(vectors + partials * grid.row_tiles) * grid.padded]) {}
  float* vector(std::int64_t i) const { return data_.get() + i * padded_; }
  float* partial(std::int64_t row_tile, int which) const { return vector(vectors_ + partials_ * row_tile + which); }
  std::int64_t partial_stride() const { return partials_ * padded_; }

 private:
  std::int64_t padded_, vectors_, partials_;
  std::unique_ptr<float[]> data_;
};

const float* floats(const std::optional<Tensor>& t) {
  return static_cast<const float*>(data_or_null(t));
}

float widen(const void* data, std::int64_t i, bool bf16) {
  return bf16 ? std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<const Bf16*>(data)[i].bits) << 16)
              : static_cast<const float*>(data)[i];
}

// Writing a float32 output past the caches spares a read of it: measured on 1.6 to 51 MB (2 cores, 2 MB of L2 each), a
// pass takes 0.5 to 1.0 of its time so. Not where the gradient of the residual has just been written to the caches and
// is read beside it: up to 13 MB that takes 1.25 to 1.8 of the time.
bool worth_streaming(const void* out, const Grid& grid, bool bf16, bool beside_residual) {
  const bool whole_lines = reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && grid.channels % 16 == 0;
  const std::int64_t from = beside_residual ? kStreamBesideResidualFrom : kStreamFrom;
  return !bf16 && whole_lines && 4 * grid.rows * grid.channels >= from;
}

struct Moments {
  double mean, variance;
};

// The plain sums, in fp64, of a channel whose shifted ones are not finite: Inf must give the mean Inf that eager gives,
// and not the NaN of Inf - Inf; values of 1e38 and of both signs have a mean although their differences overflow.
Moments plain_moments(const BnActArgs& args, std::int64_t rows, std::int64_t c) {
  double sum = 0.0, squares = 0.0;
  for (std::int64_t r = 0; r < rows; ++r)
    sum += widen(args.x, r * args.channels + c, args.bf16);
  const double mean = sum / static_cast<double>(rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    const double d = widen(args.x, r * args.channels + c, args.bf16) - mean;
    squares += d * d;
  }
  return {mean, squares / static_cast<double>(rows)};
}

double inverse_deviation(float var, double eps) {
  return 1.0 / std::sqrt(static_cast<double>(var) + eps);
}

}  // namespace

// mean, var = moments of x; y = act((x - mean) * (weight / sqrt(var + eps)) + bias + residual). The statistics are
// taken of x - row 0 of x, which costs nothing and keeps a mean a million deviations away from zero out of the sums.
void bn_act_fwd(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                double eps, std::int64_t act, Tensor y, Tensor mean, Tensor var) {
  const Grid grid(x);
  if (grid.empty()) return;
  const Workspace work(grid, 3, 3);
  float *centre = work.vector(0), *scale = work.vector(1), *shift = work.vector(2);
  BnActArgs args;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.out = y.mutable_data_ptr();
  args.channels = grid.channels;
  args.act = static_cast<int>(act);
  args.bf16 = is_bf16(x);
  args.centre = centre;
  args.scale = scale;
  args.stream = worth_streaming(args.out, grid, args.bf16, false);
  args.shift = shift;

  for (std::int64_t c = 0; c < grid.channels; ++c)
    centre[c] = widen(args.x, c, args.bf16);
  const auto statistics = FUSED_RESNET_PICK(bn_statistics);
  grid.for_tiles(false, [&](const BnTile& tile, std::int64_t t) {
    statistics(args, tile, work.partial(t, 0), work.partial(t, 1), work.partial(t, 2));
  });

  const float *w = floats(weight), *b = floats(bias);
  float *mean_out = static_cast<float*>(mean.mutable_data_ptr()),
        *var_out = static_cast<float*>(var.mutable_data_ptr());
  const auto merge = FUSED_RESNET_PICK(bn_merge_statistics);
  grid.for_channel_blocks([&](std::int64_t first, int n) {
    double shifted_mean[kMergeBlock], m2[kMergeBlock];
    merge(work.partial(0, 0) + first, work.partial(0, 1) + first, work.partial(0, 2) + first, grid.row_tiles,
          work.partial_stride(), grid.tile_rows, grid.rows, n, shifted_mean, m2);
    for (int i = 0; i < n; ++i) {
      const std::int64_t c = first + i;
      Moments moments = {centre[c] + shifted_mean[i], m2[i] / static_cast<double>(grid.rows)};
      if (!std::isfinite(moments.mean)) moments = plain_moments(args, grid.rows, c);
      mean_out[c] = centre[c] = static_cast<float>(moments.mean);
      var_out[c] = static_cast<float>(moments.variance);
      scale[c] = static_cast<float>((w ? w[c] : 1.0f) * inverse_deviation(var_out[c], eps));
      shift[c] = b ? b[c] : 0.0f;
    }
  });

  const auto apply = FUSED_RESNET_PICK(bn_apply);
  grid.for_tiles(true, [&](const BnTile& tile, std::int64_t) { apply(args, tile); });
}

// g = dy * act'; dbias = sum(g); dweight = sum(g * xhat); dresidual = g;
// dx = weight / sqrt(var + eps) * (g - mean(g) - xhat * mean(g * xhat)), xhat = (x - mean) / sqrt(var + eps).
// Given y, ReLU and ReLU6 read it; without it they compute the pre-activation again, which saves reading (and keeping)
// y where there is no residual.
void bn_act_bwd(Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> residual,
                std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean, Tensor var, double eps,
                std::int64_t act, std::optional<Tensor> dx, Tensor dweight, Tensor dbias,
                std::optional<Tensor> dresidual) {
  STD_TORCH_CHECK(act == kNone || !dresidual || y || residual,
                  "bn_act_bwd: with a residual, y or the residual itself must be there to tell the activation's slope");
  const Grid grid(x);
  if (grid.empty()) return;
  const Workspace work(grid, 5, 2);
  float *centre = work.vector(0), *scale = work.vector(1), *shift = work.vector(2);
  float *mean_g = work.vector(3), *slope = work.vector(4);
  BnActArgs args;
  args.x = x.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.y = data_or_null(y);
  args.residual = data_or_null(residual);
  args.out = dx ? dx->mutable_data_ptr() : nullptr;
  args.dresidual = dresidual ? dresidual->mutable_data_ptr() : nullptr;
  args.channels = grid.channels;
  args.act = static_cast<int>(act);
  args.bf16 = is_bf16(x);
  args.centre = centre;
  args.scale = scale;
  args.stream = worth_streaming(args.out, grid, args.bf16, args.dresidual != nullptr);
  args.shift = shift;
  args.mean_g = mean_g;
  args.slope = slope;

  const float *w = floats(weight), *b = floats(bias);
  const float* mean_in = static_cast<const float*>(mean.const_data_ptr());
  const float* var_in = static_cast<const float*>(var.const_data_ptr());
  for (std::int64_t c = 0; c < grid.channels; ++c) {
    centre[c] = mean_in[c];
    scale[c] = static_cast<float>((w ? w[c] : 1.0f) * inverse_deviation(var_in[c], eps));
    shift[c] = b ? b[c] : 0.0f;
  }
  const auto reduce = FUSED_RESNET_PICK(bn_reduce);
  grid.for_tiles(
      false, [&](const BnTile& tile, std::int64_t t) { reduce(args, tile, work.partial(t, 0), work.partial(t, 1)); });

  float* dweight_out = static_cast<float*>(dweight.mutable_data_ptr());
  float* dbias_out = static_cast<float*>(dbias.mutable_data_ptr());
  const auto merge = FUSED_RESNET_PICK(bn_merge_sums);
  grid.for_channel_blocks([&](std::int64_t first, int n) {
    double sum_g[kMergeBlock], sum_gx[kMergeBlock];
    merge(work.partial(0, 0) + first, grid.row_tiles, work.partial_stride(), n, sum_g);
    merge(work.partial(0, 1) + first, grid.row_tiles, work.partial_stride(), n, sum_gx);
    for (int i = 0; i < n; ++i) {
      const std::int64_t c = first + i;
      const double inverse = inverse_deviation(var_in[c], eps), rows = static_cast<double>(grid.rows);
      dbias_out[c] = static_cast<float>(sum_g[i]);
      dweight_out[c] = static_cast<float>(sum_gx[i] * inverse);
      mean_g[c] = static_cast<float>(sum_g[i] / rows);
      slope[c] = static_cast<float>(sum_gx[i] * inverse * inverse / rows);
    }
  });
  if (!dx) return;

  if (args.dresidual) {  // g is there, already masked
    args.dy = args.dresidual;
    args.act = kNone;
  }
  const auto input_grad = FUSED_RESNET_PICK(bn_input_grad);
  grid.for_tiles(true, [&](const BnTile& tile, std::int64_t) { input_grad(args, tile); });
}

// out = act(x * scale + shift + residual): the same pass about the centre 0.
void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out) {
  const Grid grid(x);
  if (grid.empty()) return;
  const Workspace work(grid, 1, 0);
  std::fill_n(work.vector(0), grid.padded, 0.0f);
  BnActArgs args;
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.out = out.mutable_data_ptr();
  args.channels = grid.channels;
  args.act = static_cast<int>(act);
  args.bf16 = is_bf16(x);
  args.centre = work.vector(0);
  args.scale = static_cast<const float*>(scale.const_data_ptr());
  args.shift = static_cast<const float*>(shift.const_data_ptr());
  const auto apply = FUSED_RESNET_PICK(bn_apply);
  grid.for_tiles(false, [&](const BnTile& tile, std::int64_t) { apply(args, tile); });
}

}  // namespace fused_resnet::cpu
