// The implicit GEMM's tile of the output on its way to memory.
#pragma once

#include "cuda/implicit_gemm_plan.h"

namespace fused_resnet::cuda {

// The output's tile in shared memory: it holds the residual before, and the results after them.
template <class T, class Tile>
class Output {
 public:
  static constexpr int kElements = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kColumns = kRowChunks * kElements;  // of a panel

  // `steps` of the main loop: its stages follow in turn.
  FUSED_RESNET_DEVICE Output(const ConvShape& g, const Work& work, unsigned char* memory, int steps)
      : g_(g),
        memory_(memory),
        steps_(steps),
        rows_(static_cast<int>(g.pixels() - work.pixel < Tile::kM ? g.pixels() - work.pixel : Tile::kM)),
        columns_(g.group_k - work.channel < Tile::kN ? g.group_k - work.channel : Tile::kN),
        first_(work.pixel * g.k + static_cast<std::int64_t>(work.group) * g.group_k + work.channel) {}

  FUSED_RESNET_DEVICE unsigned char* panel(int number) const {
    const int stage = (steps_ + number / Tile::kStagePanels) % Tile::kStages;
    return memory_ + stage * Tile::kStageBytes + number % Tile::kStagePanels * Tile::kM * kRowBytes;
  }

  FUSED_RESNET_DEVICE T* element(int row, int column) const {
    const int chunk = column % kColumns / kElements;
    return reinterpret_cast<T*>(panel(column / kColumns) + swizzled(row, chunk)) + column % kElements;
  }

  // Calls body(chunk in shared memory, its place in the tensor, how many elements of it are there) for the chunks of
  // the tile that are this thread's, in the panels that share a stage or in all (part < 0).
  template <class Body>
  FUSED_RESNET_DEVICE void for_chunks(int part, const Body& body) const {
    constexpr int kPanels = Tile::template kPanels<T>;
    const int begin = part < 0 ? 0 : part * Tile::kStagePanels;
    const int end = part < 0 || begin + Tile::kStagePanels > kPanels ? kPanels : begin + Tile::kStagePanels;
    const int chunk = static_cast<int>(threadIdx.x) % kRowChunks;
    for (int number = begin; number < end; ++number) {
      const int column = number * kColumns + chunk * kElements;
      if (column >= columns_) continue;
#pragma unroll 1
      for (int row = static_cast<int>(threadIdx.x) / kRowChunks; row < rows_; row += Tile::kCopyRows)
        body(reinterpret_cast<T*>(panel(number) + swizzled(row, chunk)),
             first_ + static_cast<std::int64_t>(row) * g_.k + column, columns_ - column);
    }
  }

  FUSED_RESNET_DEVICE void copy_residual(const T* residual, int part) const {
    for_chunks(part, [&](T* to, std::int64_t at, int count) {
      if (wide()) {
        cp_async16(to, residual + at, true);
      } else {
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          if (e < count) to[e] = residual[at + e];
      }
    });
  }

  FUSED_RESNET_DEVICE void store(T* out) const {
    for_chunks(-1, [&](T* from, std::int64_t at, int count) {
      const auto chunk = load_pack<T, kElements>(from);
      if (wide()) {
        store_global(out + at, chunk);
      } else {
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          if (e < count) out[at + e] = chunk.data[e];
      }
    });
  }

  FUSED_RESNET_DEVICE int rows() const { return rows_; }
  FUSED_RESNET_DEVICE int columns() const { return columns_; }
  FUSED_RESNET_DEVICE std::int64_t at(int row, int column) const {
    return first_ + static_cast<std::int64_t>(row) * g_.k + column;
  }

 private:
  // Whether rows of the tensor, and of the tile in them, are whole chunks.
  FUSED_RESNET_DEVICE bool wide() const { return g_.k % kElements == 0 && g_.group_k % kElements == 0; }

  const ConvShape& g_;
  unsigned char* memory_;
  int steps_, rows_, columns_;
  std::int64_t first_;
};

// Batch norm's first stage: the moments of each channel of the tile, as it was rounded. A lane takes 4 bytes of a row,
// so that a warp reads a panel's row at once; the warps share a panel's rows, and their moments are merged in order.
template <class T, class Tile>
FUSED_RESNET_DEVICE void store_moments(const Output<T, Tile>& tile, unsigned char* memory, float* partials,
                                       std::int64_t k) {
  constexpr int kPer = 4 / static_cast<int>(sizeof(T)), kPanels = Tile::template kPanels<T>;
  constexpr int kParts = Tile::kWarps / kPanels, kPartRows = Tile::kM / kParts;
  static_assert(Tile::kWarps % kPanels == 0);
  auto* moments = reinterpret_cast<TileMoments*>(memory);  // [kParts][kN]
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int part = warp / kPanels, row = part * kPartRows;
  const int rows = tile.rows() - row < kPartRows ? tile.rows() - row : kPartRows;
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const int column = (warp % kPanels * kWarp + lane) * kPer + e;
    moments[part * Tile::kN + column] =
        moments_of(rows, [&](int i) { return static_cast<float>(*tile.element(row + i, column)); });
  }
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < tile.columns(); column += Tile::kThreads) {
    TileMoments whole = moments[column];
    for (int i = 1; i < kParts; ++i)
      whole.merge(moments[i * Tile::kN + column]);
    PartialMoments partial = whole.partial();
    if (!partial.finite())
      partial = PartialMoments::taken_again(
          tile.rows(), [&](std::int64_t i) { return static_cast<float>(*tile.element(static_cast<int>(i), column)); });
    partial.store(partials + column, k);
  }
}

}  // namespace fused_resnet::cuda
