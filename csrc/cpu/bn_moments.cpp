#include <cmath>

#include "cpu/elementwise.h"
#include "cpu/rows.h"
#include "cpu/train.h"
#include "moments.h"

namespace fused_resnet::cpu {
namespace {

struct MomentsArgs {
  const void* x;
  std::int64_t channels;
  bool bf16;
  const float* centre;  // any value near the mean
};

}  // namespace
}  // namespace fused_resnet::cpu

#define FUSED_RESNET_KERNELS "cpu/bn_moments_kernels.h"
#include "cpu/per_isa.h"

namespace fused_resnet::cpu {
namespace {

float widen(const void* data, std::int64_t i, bool bf16) {
  return bf16 ? std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<const Bf16*>(data)[i].bits) << 16)
              : static_cast<const float*>(data)[i];
}

struct Moments {
  double mean, variance;
};

// The plain sums, in fp64, of a channel whose shifted ones are not finite: Inf must give the mean Inf that eager gives,
// and not the NaN of Inf - Inf; values of 1e38 and of both signs have a mean although their differences overflow.
Moments plain_moments(const MomentsArgs& args, std::int64_t rows, std::int64_t c) {
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

}  // namespace

// mean and biased variance of every channel. They are taken of x - row 0 of x, which costs nothing and keeps a mean a
// million deviations away from zero out of the sums.
void bn_moments(Tensor x, Tensor mean, Tensor var) {
  const Grid grid(x);
  if (grid.empty()) return;
  const Workspace work(grid, 1, 3);
  float* centre = work.vector(0);
  const MomentsArgs args{x.const_data_ptr(), grid.channels, is_bf16(x), centre};
  for (std::int64_t c = 0; c < grid.channels; ++c)
    centre[c] = widen(args.x, c, args.bf16);
  const auto kernel = FUSED_RESNET_PICK(bn_moments_tile);
  grid.for_tiles(false, [&](const Tile& tile, std::int64_t t) {
    kernel(args, tile, work.partial(t, 0), work.partial(t, 1), work.partial(t, 2));
  });

  float *mean_out = static_cast<float*>(mean.mutable_data_ptr()),
        *var_out = static_cast<float*>(var.mutable_data_ptr());
  const auto merge = FUSED_RESNET_PICK(bn_merge_moments);
  grid.for_channel_blocks([&](std::int64_t first, int n) {
    double shifted_mean[kMergeBlock], m2[kMergeBlock];
    merge(work.partial(0, 0) + first, work.partial(0, 1) + first, work.partial(0, 2) + first, grid.row_tiles,
          work.partial_stride(), grid.tile_rows, grid.rows, n, shifted_mean, m2);
    for (int i = 0; i < n; ++i) {
      const std::int64_t c = first + i;
      Moments moments = {centre[c] + shifted_mean[i], m2[i] / static_cast<double>(grid.rows)};
      if (!std::isfinite(moments.mean)) moments = plain_moments(args, grid.rows, c);
      mean_out[c] = static_cast<float>(moments.mean);
      var_out[c] = static_cast<float>(moments.variance);
    }
  });
}

}  // namespace fused_resnet::cpu
