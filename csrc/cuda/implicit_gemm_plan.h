// Where the implicit GEMM's tiles, steps and fragments lie: what the kernel does with these numbers, the tests check
// without a GPU.
//
// The GEMM of a group: rows are output pixels (n, p, q), columns its output channels, and the depth runs over the
// filter's rows, its columns and the group's input channels, as channels_last weights lie in memory.
#pragma once

#include "cuda/tile_moments.h"

namespace fused_resnet::cuda {

constexpr int kRowBytes = 128;                       // a step's part of a row in shared memory: all 32 banks
constexpr int kChunkBytes = 16;                      // what is copied, and read by ldmatrix, at once
constexpr int kRowChunks = kRowBytes / kChunkBytes;  // 8
constexpr int kMmaBytes = 2 * kChunkBytes;           // the depth of one mma
constexpr int kRowMmas = kRowBytes / kMmaBytes;      // 4

// Numbers of 32 bits, because a thread works with most of them at every step.
struct ConvShape {
  int n, c, h, w, k, p, q;
  int r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups, group_c, group_k;
  int depth;   // r * s * group_c, filled up to whole chunks: the length of a packed filter
  int splits;  // blocks that share the depth of a tile

  FUSED_RESNET_HOST_DEVICE constexpr int map() const { return p * q; }
  FUSED_RESNET_HOST_DEVICE constexpr std::int64_t pixels() const { return static_cast<std::int64_t>(n) * map(); }
};

// A tile of kM pixels and kN channels by kWarpsM x kWarpsN warps, with kStages steps in shared memory.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;   // of a warp
  static constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 8;  // mma fragments of a warp
  static constexpr int kCopyRows = kThreads / kRowChunks;              // rows that are copied at once
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kM % kCopyRows == 0 && kN % kCopyRows == 0);

  // The output's tile takes the place of stages that are empty: panels of kRowBytes of channels, kM rows each.
  template <class T>
  static constexpr int kPanels = kN * static_cast<int>(sizeof(T)) / kRowBytes;
  static constexpr int kStagePanels = kStageBytes / (kM * kRowBytes);
  template <class T>
  static constexpr int kOutputStages = (kPanels<T> + kStagePanels - 1) / kStagePanels;

  // Batch norm's moments take a stage that the output does not need; behind the stages lie scale, shift and a flag.
  static_assert(kWarps * kRowBytes / 2 * sizeof(TileMoments) <= kStageBytes && kOutputStages<float> < kStages);
  static constexpr int kVectors = kStages * kStageBytes;
  static constexpr int kFlag = kVectors + 2 * kN * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kFlag + kChunkBytes;
};

// The tile and the part of its depth that a block works on. Channels run first: blocks that run at the same time read
// the same pixels, and the weights, which are few, stay in L2.
struct Work {
  std::int64_t pixel;  // the first one
  int group, channel;  // the first one within the group
  int split;
};

FUSED_RESNET_HOST_DEVICE constexpr std::int64_t count_blocks(const ConvShape& g, int tile_m, int tile_n) {
  return ceil_div(g.pixels(), tile_m) * ceil_div(g.group_k, tile_n) * g.groups * g.splits;
}

FUSED_RESNET_HOST_DEVICE constexpr Work work_of(const ConvShape& g, int tile_m, int tile_n, std::int64_t block) {
  const std::int64_t tiles_n = ceil_div(g.group_k, tile_n);
  Work work{};
  work.channel = static_cast<int>(block % tiles_n) * tile_n;
  block /= tiles_n;
  work.group = static_cast<int>(block % g.groups);
  block /= g.groups;
  work.split = static_cast<int>(block % g.splits);
  work.pixel = block / g.splits * tile_m;
  return work;
}

// The first step of a split of `steps`; that of the next one is its end. They differ by one step at most.
FUSED_RESNET_HOST_DEVICE constexpr int split_begin(int steps, int splits, int split) {
  return static_cast<int>(static_cast<std::int64_t>(steps) * split / splits);
}

// Where a chunk of a row lies in a stage or a panel. The chunks of a row are exchanged so that the same chunk of 8 rows
// in a row, which ldmatrix reads and a warp writes, lies in all the banks.
FUSED_RESNET_HOST_DEVICE constexpr int swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row % kRowChunks)) * kChunkBytes);
}

// The row and the chunk whose address a lane gives to ldmatrix_x4: of pixels for a fragment a of 16 rows, and of
// channels for the fragments b of twice 8.
FUSED_RESNET_HOST_DEVICE constexpr int a_row(int lane) {
  return lane % 16;
}
FUSED_RESNET_HOST_DEVICE constexpr int a_chunk(int lane) {
  return lane / 16;
}
FUSED_RESNET_HOST_DEVICE constexpr int b_row(int lane) {
  return lane % 8 + lane / 16 * 8;
}
FUSED_RESNET_HOST_DEVICE constexpr int b_chunk(int lane) {
  return lane / 8 % 2;
}

// The row and the column, from the fragment's first, of element i of an accumulator.
FUSED_RESNET_HOST_DEVICE constexpr int d_row(int lane, int i) {
  return lane / 4 + i / 2 * 8;
}
FUSED_RESNET_HOST_DEVICE constexpr int d_column(int lane, int i) {
  return lane % 4 * 2 + i % 2;
}

// A row and a column of an image, of which neither goes beyond 16 bits, in one register.
struct Position {
  static constexpr int kOutside = INT16_MIN;  // a row from which no tap reaches the image
  int bits;

  FUSED_RESNET_HOST_DEVICE static constexpr Position of(int h, int w) { return {h * (1 << 16) | (w & 0xffff)}; }
  FUSED_RESNET_HOST_DEVICE constexpr int h() const { return bits >> 16; }
  FUSED_RESNET_HOST_DEVICE constexpr int w() const { return static_cast<std::int16_t>(bits); }
};

// A place in the depth: a tap and the first of a chunk's channels.
struct Depth {
  int r, s, c;

  FUSED_RESNET_HOST_DEVICE constexpr Depth(const ConvShape& g, int at)
      : r(at / g.group_c / g.s), s(at / g.group_c % g.s), c(at % g.group_c) {}

  FUSED_RESNET_HOST_DEVICE constexpr void advance(const ConvShape& g, int by) {
    c += by;
    while (c >= g.group_c) {
      c -= g.group_c;
      if (++s == g.s) {
        s = 0;
        ++r;
      }
    }
  }
};

}  // namespace fused_resnet::cuda
