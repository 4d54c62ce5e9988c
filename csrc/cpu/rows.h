// A channels_last tensor as rows (pixels) of channels, cut into tiles; and the memory for sums over its rows. What it
// has of the sizes alone every sum over the tiles has too: its order, whatever the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace fused_resnet::cpu {

constexpr int kMergeBlock = 64;  // channels whose partial sums are merged together

struct Tile {
  std::int64_t row, rows, channel, channels;
};

struct Grid {
  static constexpr std::int64_t kTileChannels = 512;      // at most: long rows suit the hardware's prefetcher
  static constexpr std::int64_t kTileElements = 1 << 14;  // small enough to give every thread work at 7 x 7
  static constexpr std::int64_t kMaxRowTiles = 256;       // bounds the partial sums, which are merged on few threads

  std::int64_t rows, channels, tile_rows, tile_channels, row_tiles, channel_tiles;

  explicit Grid(const torch::stable::Tensor& x) {
    channels = x.size(1);
    rows = channels ? x.numel() / channels : 0;
    if (rows == 0) return;
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
        body(Tile{row, std::min(tile_rows, rows - row), channel, std::min(tile_channels, channels - channel)},
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
      : padded_((grid.channels + 15) / 16 * 16),
        vectors_(vectors),
        partials_(partials),
        data_(new float[(vectors + partials * grid.row_tiles) * padded_]) {}
  float* vector(std::int64_t i) const { return data_.get() + i * padded_; }
  float* partial(std::int64_t row_tile, int which) const { return vector(vectors_ + partials_ * row_tile + which); }
  std::int64_t partial_stride() const { return partials_ * padded_; }

 private:
  std::int64_t padded_, vectors_, partials_;
  std::unique_ptr<float[]> data_;
};

}  // namespace fused_resnet::cpu
