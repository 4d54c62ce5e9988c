// Batch norm's statistics and gradient sums: the tiles' partial ones, and their merging in fp64.

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/tile_moments.h"

namespace fused_resnet::cuda {
namespace {

// The numbers among 0 ... count - 1 that are `first` modulo `step`.
FUSED_RESNET_DEVICE float count_from(int first, int step, std::int64_t count) {
  return first < count ? static_cast<float>((count - first - 1) / step + 1) : 0.0f;
}

// partials[tile] = the moments of the tile (tile_moments.h), in fp32 of x - centre. The centre is the tile's first row,
// which keeps a mean a million deviations away from zero out of the sums. Moments that are not finite are those of rows
// that are not, or of numbers beyond 1e18 whose squares or sums overflow: such a channel is read once more.
template <class T, int kN>
__global__ void __launch_bounds__(RowGrid::kThreads) bn_stats_kernel(const T* x, float* partials, RowGrid grid) {
  const RowTile tile(grid, kN);
  float centre[kN], moments[2 * kN] = {};  // the sums, then M2
  if (tile.inside) {
    const auto first = load_pack<T, kN>(x + tile.row * grid.channels + tile.channel);
#pragma unroll
    for (int e = 0; e < kN; ++e)
      centre[e] = widen(first, e);
  }

  // The rows at once give their own sum and M2, which are merged into those of the rows before.
  float before = 0.0f;
  for_rows<RowGrid::kAtOnce>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    Pack<T, kN> a[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a[i] = load_pack<T, kN>(x + (row + i * tile.lines) * grid.channels + tile.channel);
    const float inverse = before > 0.0f ? 1.0f / before : 0.0f;
    const float weight = MergeWeights<float>(before, kRows).weight;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      float d[kRows], sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        sum += d[i] = widen(a[i], e) - centre[e];
      const float mean = sum * (1.0f / kRows);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        squares += (d[i] - mean) * (d[i] - mean);
      const float delta = mean - moments[e] * inverse;
      moments[e] += sum;
      moments[kN + e] += squares + delta * delta * weight;
    }
    before += kRows;
  });

  merge_lines(tile, moments, [&](float (&own)[2 * kN], const float (&other)[2 * kN], int half) {
    const float here = count_from(tile.line + half, 2 * half, tile.end - tile.row);
    if (here == 0.0f) return;
    const float there = count_from(tile.line, 2 * half, tile.end - tile.row);
    const float inverse = 1.0f / there, other_inverse = 1.0f / here, weight = MergeWeights<float>(there, here).weight;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      const float delta = other[e] * other_inverse - own[e] * inverse;
      own[e] += other[e];
      own[kN + e] += other[kN + e] + delta * delta * weight;
    }
  });
  if (tile.line != 0 || !tile.inside) return;

  float high[kN], low[kN], variance[kN];
  const std::int64_t rows = tile.end - tile.row;
  const double inverse = 1.0 / static_cast<double>(rows);
  unsigned again = 0;  // a bit a channel
#pragma unroll
  for (int e = 0; e < kN; ++e) {
    const PartialMoments partial(centre[e] + moments[e] * inverse, moments[kN + e] * inverse);
    high[e] = partial.high, low[e] = partial.low, variance[e] = partial.variance;
    again |= (partial.finite() ? 0u : 1u) << e;
  }
  float* out = partials + tile.index * 3 * grid.channels + tile.channel;
  store_channels(out, high);
  store_channels(out + grid.channels, low);
  store_channels(out + 2 * grid.channels, variance);
#pragma unroll 1
  for (int e = 0; again >> e; ++e) {
    if (!(again >> e & 1)) continue;
    const T* column = x + tile.row * grid.channels + tile.channel + e;
    PartialMoments::taken_again(rows, [&](std::int64_t i) {
      return static_cast<float>(column[i * grid.channels]);
    }).store(out + e, grid.channels);
  }
}

// The second stage: a block merges the tiles of 8 channels, 128 of them at a time, in fp64.
constexpr int kMergeChannels = 8, kMergeLines = 128;
constexpr int kMergeThreads = kMergeChannels * kMergeLines;
constexpr std::size_t kMergeMemory = sizeof(double) * kMergeThreads;

FUSED_RESNET_DEVICE std::int64_t merged_channel() {
  return static_cast<std::int64_t>(blockIdx.x) * kMergeChannels + threadIdx.x % kMergeChannels;
}

// The sum of value(tile) over all tiles: every thread has some of them, then a tree over those of a channel. All
// threads of the block call it, and all of a channel get its sum.
template <class Value>
FUSED_RESNET_DEVICE double sum_of_tiles(std::int64_t tiles, bool inside, const Value& value) {
  double* shared = reinterpret_cast<double*>(block_memory());
  double sum = 0.0;
  if (inside)
#pragma unroll 4
    for (std::int64_t t = threadIdx.x / kMergeChannels; t < tiles; t += kMergeLines)
      sum += value(t);
  __syncthreads();  // the sum before this one has been read
  shared[threadIdx.x] = sum;
  for (unsigned half = kMergeThreads / 2; half >= kMergeChannels; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[threadIdx.x % kMergeChannels];
}

// mean and var = the moments of all rows, of partials [tiles, 3, C]: first the mean, then the deviations from it. Tile
// t has tile_rows rows, the last one what is left.
__global__ void __launch_bounds__(kMergeThreads)
    bn_finalize_kernel(const float* partials, float* mean, float* var, std::int64_t channels, std::int64_t tiles,
                       std::int64_t rows, std::int64_t tile_rows) {
  const std::int64_t c = merged_channel();
  const double last = static_cast<double>(rows - (tiles - 1) * tile_rows), full = static_cast<double>(tile_rows);
  const auto partial = [&](std::int64_t t, int which) {
    return static_cast<double>(partials[(3 * t + which) * channels + c]);
  };
  const auto here = [&](std::int64_t t) { return t + 1 < tiles ? full : last; };
  const double sum =
      sum_of_tiles(tiles, c < channels, [&](std::int64_t t) { return here(t) * (partial(t, 0) + partial(t, 1)); });
  const double centre = sum / static_cast<double>(rows);
  const double m2 = sum_of_tiles(tiles, c < channels, [&](std::int64_t t) {
    const double d = partial(t, 0) + partial(t, 1) - centre;
    return here(t) * (partial(t, 2) + d * d);
  });
  if (threadIdx.x >= kMergeChannels || c >= channels) return;
  mean[c] = static_cast<float>(centre);
  var[c] = static_cast<float>(m2 / static_cast<double>(rows));
}

// Of partials [tiles, sums, C], the sums of g, of g * (x - mean) and, where there are three of them, of g * (residual -
// its mean): dbias, dweight and dresidual_weight.
__global__ void __launch_bounds__(kMergeThreads)
    bn_reduce_finalize_kernel(const float* partials, const float* var, double eps, const float* residual_var,
                              double residual_eps, float* dweight, float* dbias, float* dresidual_weight,
                              std::int64_t channels, std::int64_t tiles) {
  const std::int64_t c = merged_channel();
  const bool inside = c < channels, writes = threadIdx.x < kMergeChannels && inside;
  const int sums = residual_var ? 3 : 2;
  const auto total = [&](int which) {
    return sum_of_tiles(tiles, inside, [&](std::int64_t t) { return partials[(sums * t + which) * channels + c]; });
  };
  const auto over_deviation = [&](double sum, const float* of, double with_eps) {
    return static_cast<float>(sum / std::sqrt(static_cast<double>(of[c]) + with_eps));
  };
  const double sum_g = total(0), sum_gx = total(1);
  if (writes) {
    dbias[c] = static_cast<float>(sum_g);
    dweight[c] = over_deviation(sum_gx, var, eps);
  }
  if (!residual_var) return;
  const double sum_gr = total(2);
  if (writes) dresidual_weight[c] = over_deviation(sum_gr, residual_var, residual_eps);
}

}  // namespace

void bn_stats(Tensor x, std::int64_t tile_rows, Tensor partials) {
  const Arguments args("bn_stats", x);
  args.image(x, "x");
  args.partials(partials, x, tile_rows, 3);
  const Launcher launch(x);
  const std::int64_t channels = x.size(1), rows = x.numel() / channels;
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(channels, [&](auto width) {
      const RowGrid grid(rows, channels, width(), tile_rows);
      launch(bn_stats_kernel<T, width()>, grid.blocks(), RowGrid::kThreads, merge_memory(2 * width()),
             static_cast<const T*>(x.const_data_ptr()), floats(partials), grid);
    });
  });
}

void bn_finalize(Tensor partials, std::int64_t rows, std::int64_t tile_rows, Tensor mean, Tensor var) {
  const Arguments args("bn_finalize", partials);
  args.number(rows, 1, "rows", INT64_MAX);
  args.number(tile_rows, 1, "tile_rows");
  const std::int64_t channels = mean.numel(), tiles = (rows - 1) / tile_rows + 1;
  args.number(channels, 1, "the size of mean");
  args.vector(mean, channels, "mean");
  args.vector(var, channels, "var");
  args.matrix(partials, ScalarType::Float, tiles, 3 * channels, "partials");
  const Launcher launch(partials);
  launch(bn_finalize_kernel, ceil_div(channels, kMergeChannels), kMergeThreads, kMergeMemory, floats(partials),
         floats(mean), floats(var), channels, tiles, rows, tile_rows);
}

void bn_reduce_finalize(Tensor partials, Tensor var, double eps, std::optional<Tensor> residual_var,
                        double residual_eps, Tensor dweight, Tensor dbias, std::optional<Tensor> dresidual_weight) {
  const Arguments args("bn_reduce_finalize", partials);
  const std::int64_t channels = var.numel();
  args.number(channels, 1, "the size of var");
  const std::int64_t sums = residual_var ? 3 : 2;
  const std::int64_t tiles = std::max<std::int64_t>(1, partials.numel() / (sums * channels));
  args.matrix(partials, ScalarType::Float, tiles, sums * channels, "partials");
  args.vector(var, channels, "var");
  args.vector(residual_var, channels, "residual_var");
  args.vector(dweight, channels, "dweight");
  args.vector(dbias, channels, "dbias");
  args.vector(dresidual_weight, channels, "dresidual_weight");
  if (residual_var) args.given(dresidual_weight, "dresidual_weight", "a number for each channel beside residual_var");
  const Launcher launch(partials);
  float* const written = dresidual_weight ? floats(*dresidual_weight) : nullptr;
  launch(bn_reduce_finalize_kernel, ceil_div(channels, kMergeChannels), kMergeThreads, kMergeMemory, floats(partials),
         floats(var), eps, floats(residual_var), residual_eps, floats(dweight), floats(dbias), written, channels,
         tiles);
}

}  // namespace fused_resnet::cuda
