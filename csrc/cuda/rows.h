// Passes over a dense NHWC tensor as rows (pixels) x channels. A block takes a tile of rows of up to 32 accesses of
// channels; its threads lie side by side in a row and, line below line, over as many rows as there are threads left. A
// thread stays in its column, so what belongs to a channel is read once and kept in registers.
#pragma once

#include <algorithm>

#include "cuda/device.h"
#include "cuda/widen.h"

namespace fused_resnet::cuda {

// How rows x channels are cut: by their sizes alone, so that every sum has one order.
struct RowGrid {
  static constexpr int kThreads = 256;
  static constexpr int kMostLanes = 32;
  static constexpr int kAtOnce = 4;              // rows that a thread has in flight
  static constexpr std::int64_t kBlocks = 3168;  // 132 SMs x 24: whole waves of 2, 3, 4 or 6 blocks an SM

  std::int64_t rows, channels, tile_rows;
  int lane_bits = 0;  // 2^lane_bits threads side by side
  int channel_tiles;

  // `width` elements an access; without tile_rows, the tiles of a pass that leaves nothing behind for each of them.
  RowGrid(std::int64_t rows, std::int64_t channels, int width, std::int64_t tile_rows = 0)
      : rows(rows), channels(channels), tile_rows(tile_rows) {
    const std::int64_t accesses = channels / width;
    while (lanes() < std::min<std::int64_t>(accesses, kMostLanes))
      ++lane_bits;
    channel_tiles = static_cast<int>(ceil_div(accesses, lanes()));
    const std::int64_t step = kAtOnce * kThreads / lanes();
    if (tile_rows == 0) this->tile_rows = step * std::max<std::int64_t>(1, rows * channel_tiles / (kBlocks * step));
  }

  int lanes() const { return 1 << lane_bits; }
  std::int64_t row_tiles() const { return ceil_div(rows, tile_rows); }
  std::int64_t blocks() const { return row_tiles() * channel_tiles; }
};

// This thread's part of its block's tile: the channels from `channel` on, in the rows row + line, row + line + lines...
struct RowTile {
  std::int64_t index, row, end, channel;  // `end` is behind the tile's last row
  int line, lines, lanes;
  bool inside;  // has channels

  // Backwards the last tile comes first: what the pass before has read last is in the cache.
  FUSED_RESNET_DEVICE RowTile(const RowGrid& grid, int width, bool backwards = false) {
    const unsigned block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const unsigned tile = block / grid.channel_tiles, lane = threadIdx.x & ((1u << grid.lane_bits) - 1);
    lanes = 1 << grid.lane_bits;
    lines = RowGrid::kThreads >> grid.lane_bits;
    line = static_cast<int>(threadIdx.x >> grid.lane_bits);
    channel = (static_cast<std::int64_t>(block - tile * grid.channel_tiles) * lanes + lane) * width;
    inside = channel < grid.channels;
    index = tile;
    row = tile * grid.tile_rows;
    end = row + grid.tile_rows < grid.rows ? row + grid.tile_rows : grid.rows;
  }
};

// Calls body(row, integral constant) for this thread's rows: as many of them at once, `lines` rows apart.
template <int kAtOnce, class Body>
FUSED_RESNET_DEVICE void for_rows(const RowTile& tile, const Body& body) {
  if (!tile.inside) return;
  std::int64_t row = tile.row + tile.line;
  for (; row + (kAtOnce - 1) * tile.lines < tile.end; row += kAtOnce * tile.lines)
    body(row, std::integral_constant<int, kAtOnce>{});
  if constexpr (kAtOnce > 1)
    for (; row < tile.end; row += tile.lines)
      body(row, std::integral_constant<int, 1>{});
}

constexpr std::size_t merge_memory(int values) {
  return sizeof(float) * values * RowGrid::kThreads;
}

// Merges the values of all lines into those of line 0, in a tree. combine(own, other, half) merges the rows
// line + half, line + 3 * half... of the tile into the rows line, line + 2 * half... Takes merge_memory(kValues).
template <int kValues, class Combine>
FUSED_RESNET_DEVICE void merge_lines(const RowTile& tile, float (&own)[kValues], const Combine& combine) {
  float* shared = reinterpret_cast<float*>(block_memory()) + threadIdx.x;  // [kValues][kThreads]
#pragma unroll
  for (int v = 0; v < kValues; ++v)
    shared[v * RowGrid::kThreads] = own[v];
  for (int half = tile.lines / 2; half > 0; half /= 2) {
    __syncthreads();
    if (tile.line < half) {
      float other[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v)
        other[v] = shared[v * RowGrid::kThreads + half * tile.lanes];
      combine(own, other, half);
#pragma unroll
      for (int v = 0; v < kValues; ++v)
        shared[v * RowGrid::kThreads] = own[v];
    }
  }
}

}  // namespace fused_resnet::cuda
