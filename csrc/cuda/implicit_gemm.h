// out[m, n] = act(sum_d a[m, d] * b[n, d] * scale[n] + shift[n] + residual[m, n]): a convolution as a GEMM over output
// pixels m, output channels n and depth d = (filter row, filter column, input channel), whose matrix a is never made:
// each chunk of 16 bytes of a row is copied from the image, or zero, while the tensor cores multiply earlier ones.
//
// A block computes a Tile of pixels x channels by mma.sync, accumulated in fp32. Copies (cp.async) run kStages - 1
// steps ahead. Where they have no steps left, the residual's tile follows in their place; the results are put there
// too, so that they leave in 16 bytes a thread and whole rows a warp.
#pragma once

#include "cuda/implicit_gemm_plan.h"
#include "cuda/launch.h"
#include "cuda/products.h"
#include "cuda/tile_moments.h"

namespace fused_resnet::cuda {

struct ConvArgs {
  const void* x;
  const void* weight;  // [K, depth]
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  const void* residual;
  void* out;
  float* sums;      // [splits, pixels, K]: where the depth is split, sums go there and nothing else is done
  float* partials;  // [tiles of pixels, 3, K]: the moments of what is written to out
  int act;
};

// How elements of T are multiplied.
template <class T, Products kProducts_>
struct Arithmetic {
  using Element = T;
  static constexpr Products kProducts = kProducts_;
};

// acc += a * b for one fragment a and kN fragments b.
template <class A, int kN>
FUSED_RESNET_DEVICE void multiply(float (&acc)[kN][4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[kN][2]) {
  [[maybe_unused]] std::uint32_t high[4], low[4];
  if constexpr (A::kProducts != Products::kHalf) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      high[i] = high_part(a[i]), low[i] = low_part(a[i]);
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    if constexpr (A::kProducts == Products::kHalf)
      mma<typename A::Element>(acc[j], a, b[j][0], b[j][1]);
    else if constexpr (A::kProducts == Products::kTf32)
      mma_tf32(acc[j], high, high_part(b[j][0]), high_part(b[j][1]));
    else
      mma_fp32(acc[j], high, low, b[j][0], b[j][1]);
  }
}

// Copies the steps of a block's depth to shared memory. A thread copies the same chunk of each of its rows. Without
// kAligned, where the channels of a tap are not whole chunks, it gathers the elements of a chunk of a one by one.
template <class T, class Tile, bool kAligned>
class Loader {
 public:
  static constexpr int kElements = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kStep = kRowChunks * kElements;
  static constexpr int kRowsA = Tile::kM / Tile::kCopyRows, kRowsB = Tile::kN / Tile::kCopyRows;

  FUSED_RESNET_DEVICE Loader(const ConvShape& g, const ConvArgs& args, const Work& work, int first_step)
      : g_(g),
        row_(static_cast<int>(threadIdx.x) / kRowChunks),
        chunk_(static_cast<int>(threadIdx.x) % kRowChunks),
        at_(first_step * kStep + chunk_ * kElements),
        depth_(g, at_),
        channels_(g.group_k - work.channel) {
    // The tile's first pixel is divided in 64 bits, the others, from there on, in 32.
    const std::int64_t image = work.pixel / g.map();
    const auto first = static_cast<unsigned>(work.pixel % g.map()), map = static_cast<unsigned>(g.map());
    x_ = static_cast<const T*>(args.x) + image * g.h * g.w * g.c + work.group * g.group_c;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int row = row_ + i * Tile::kCopyRows;
      const unsigned images = first + row < map ? 0 : (first + row) / map, pixel = first + row - images * map;
      const int h = static_cast<int>(pixel / g.q) * g.stride_h - g.pad_h;
      const int w = static_cast<int>(pixel % g.q) * g.stride_w - g.pad_w;
      position_[i] = Position::of(work.pixel + row < g.pixels() ? h : Position::kOutside, w);
      const std::int64_t from = ((static_cast<std::int64_t>(images) * g.h + h) * g.w + w) * g.c;
      from_[i] = static_cast<Offset>(kAligned ? from / kElements : from);
    }
    const std::int64_t first_channel = static_cast<std::int64_t>(work.group) * g.group_k + work.channel;
    weight_ = static_cast<const T*>(args.weight) + first_channel * g.depth;
  }

  // Copies the next step to `stage`.
  FUSED_RESNET_DEVICE void copy(unsigned char* stage) {
    const Tap tap(g_, depth_);
#pragma unroll
    for (int i = 0; i < kRowsA; ++i)
      copy_pixel(stage + swizzled(row_ + i * Tile::kCopyRows, chunk_), i, tap);
    stage += Tile::kM * kRowBytes;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int row = row_ + i * Tile::kCopyRows;
      const bool inside = at_ < g_.depth && row < channels_;
      cp_async16(stage + swizzled(row, chunk_), weight_ + (inside ? row * g_.depth + at_ : 0), inside);
    }
    at_ += kStep;
    depth_.advance(g_, kStep);
  }

 private:
  // In registers these are most of what a thread has beside the sums. From the tile's first image chunks are counted in
  // 32 bits, which is 32 GB, and elements, where they are no chunks, in 64.
  using Offset = std::conditional_t<kAligned, int, std::int64_t>;

  // What is added to a pixel's row, column and offset to come to a tap's; outside of the filter, to none in the image.
  struct Tap {
    int h, w;
    Offset offset;

    FUSED_RESNET_DEVICE Tap(const ConvShape& g, const Depth& d)
        : h(d.r < g.r ? d.r * g.dilation_h : INT16_MAX * 2),
          w(d.s * g.dilation_w),
          offset((static_cast<Offset>(h) * g.w + w) * (kAligned ? g.c / kElements : g.c) +
                 (kAligned ? d.c / kElements : d.c)) {}
  };

  FUSED_RESNET_DEVICE bool inside(int i, const Tap& tap) const {
    const auto h = static_cast<unsigned>(position_[i].h() + tap.h), w = static_cast<unsigned>(position_[i].w() + tap.w);
    return h < static_cast<unsigned>(g_.h) && w < static_cast<unsigned>(g_.w);
  }

  FUSED_RESNET_DEVICE void copy_pixel(unsigned char* to, int i, const Tap& tap) const {
    if constexpr (kAligned) {
      const bool valid = inside(i, tap);
      cp_async16(to, x_ + static_cast<std::int64_t>(valid ? from_[i] + tap.offset : 0) * kElements, valid);
    } else {
      Pack<T, kElements> chunk;
      Depth d = depth_;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const Tap here(g_, d);
        chunk.data[e] = inside(i, here) ? x_[from_[i] + here.offset] : static_cast<T>(0.0f);
        d.advance(g_, 1);
      }
      store_pack(reinterpret_cast<T*>(to), chunk);
    }
  }

  const ConvShape& g_;
  int row_, chunk_, at_;
  Depth depth_;
  int channels_;
  const T* x_;
  Position position_[kRowsA];
  Offset from_[kRowsA];
  const T* weight_;
};

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

// One sum of products, one after the other in fp32, of a part of the depth: what a tile falls back to where a sum of
// rounded or split products is not finite: the largest floats have an infinite TF32, and Inf has no low part.
template <class T>
FUSED_RESNET_DEVICE float plain_sum(const ConvShape& g, const ConvArgs& args, const Work& work, std::int64_t pixel,
                                    int channel, int begin, int end) {
  const std::int64_t n = pixel / g.map();
  const int p = static_cast<int>(pixel / g.q % g.p), q = static_cast<int>(pixel % g.q);
  const T* x = static_cast<const T*>(args.x) + work.group * g.group_c;
  const T* weight =
      static_cast<const T*>(args.weight) + (static_cast<std::int64_t>(work.group) * g.group_k + channel) * g.depth;
  Depth d(g, begin);
  float sum = 0.0f;
  for (int at = begin; at < end && d.r < g.r; ++at, d.advance(g, 1)) {
    const std::int64_t h = static_cast<std::int64_t>(p) * g.stride_h - g.pad_h + d.r * g.dilation_h;
    const std::int64_t w = static_cast<std::int64_t>(q) * g.stride_w - g.pad_w + d.s * g.dilation_w;
    if (h >= 0 && h < g.h && w >= 0 && w < g.w)
      sum += static_cast<float>(x[((n * g.h + h) * g.w + w) * g.c + d.c]) * static_cast<float>(weight[at]);
  }
  return sum;
}

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

// How many blocks' registers have to fit: while one waits for its copies, another one multiplies.
template <class A, class Tile, bool kAligned>
constexpr int blocks_per_sm() {
  if (Tile::kThreads > 128) return 1;
  if (Tile::kM * Tile::kN > 64 * 64 || A::kProducts == Products::kFp32) return 2;
  return A::kProducts == Products::kHalf && kAligned ? 4 : 3;
}

template <class A, class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads, blocks_per_sm<A, Tile, kAligned>())
    implicit_gemm_kernel(const ConvShape g, const ConvArgs args) {
  using T = typename A::Element;
  using Load = Loader<T, Tile, kAligned>;
  unsigned char* memory = block_memory();
  const Work work = work_of(g, Tile::kM, Tile::kN, blockIdx.x);
  const int all_steps = static_cast<int>(ceil_div(g.depth, Load::kStep));
  const int first_step = split_begin(all_steps, g.splits, work.split);
  const int steps = split_begin(all_steps, g.splits, work.split + 1) - first_step;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int warp_row = warp / Tile::kWarpsN * Tile::kWarpM, warp_column = warp % Tile::kWarpsN * Tile::kWarpN;

  // 1. Per-channel vectors; barriers of the main loop are between here and their use.
  auto* vectors = reinterpret_cast<float*>(memory + Tile::kVectors);
  auto* flag = reinterpret_cast<int*>(memory + Tile::kFlag);
  for (int i = thread; i < Tile::kN; i += Tile::kThreads) {
    const bool inside = work.channel + i < g.group_k;
    const int channel = work.group * g.group_k + work.channel + i;
    vectors[i] = inside && args.scale ? args.scale[channel] : 1.0f;
    vectors[Tile::kN + i] = inside && args.shift ? args.shift[channel] : 0.0f;
  }
  if (thread == 0) *flag = 0;

  // 2. The main loop.
  Load load(g, args, work, first_step);
  const Output<T, Tile> tile(g, work, memory, steps);
  const auto* residual = static_cast<const T*>(args.residual);
  const auto issue = [&](int step) {
    const int part = step - steps;
    if (part < 0)
      load.copy(memory + step % Tile::kStages * Tile::kStageBytes);
    else if (residual && part < Tile::template kOutputStages<T>)
      tile.copy_residual(residual, part);
    cp_async_commit();
  };
  float acc[Tile::kBlocksM][Tile::kBlocksN][4] = {};
#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step)
    issue(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the step has come for all, and the stage that is filled next was read by all
    issue(step + Tile::kStages - 1);
    const unsigned char* stage = memory + step % Tile::kStages * Tile::kStageBytes;
    // unrolled, the sums of fp32 would take more registers than there are
#pragma unroll(A::kProducts == Products::kFp32 ? 1 : kRowMmas)
    for (int part = 0; part < kRowMmas; ++part) {
      std::uint32_t b[Tile::kBlocksN][2];
#pragma unroll
      for (int j = 0; j < Tile::kBlocksN; j += 2) {
        std::uint32_t two[4];
        const int row = warp_column + j * 8 + b_row(lane);
        ldmatrix_x4(two, stage + Tile::kM * kRowBytes + swizzled(row, 2 * part + b_chunk(lane)));
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < Tile::kBlocksM; ++i) {
        std::uint32_t a[4];
        ldmatrix_x4(a, stage + swizzled(warp_row + i * 16 + a_row(lane), 2 * part + a_chunk(lane)));
        multiply<A>(acc[i], a, b);
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  // Calls body(accumulator, row, column) for pairs of elements, side by side in a row.
  const auto for_pairs = [&](const auto& body) {
#pragma unroll
    for (int i = 0; i < Tile::kBlocksM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kBlocksN; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          body(&acc[i][j][e], warp_row + i * 16 + d_row(lane, e), warp_column + j * 8 + d_column(lane, e));
  };

  // 3. Sums that are not finite, of products of other numbers than were given.
  bool plain = false;
  if constexpr (A::kProducts != Products::kHalf) {
    for_pairs([&](const float* d, int, int) {
      if (!is_finite(d[0] + d[1])) *flag = 1;
    });
    __syncthreads();
    plain = *flag != 0;
  }
  const int depth_begin = first_step * Load::kStep, depth_end = (first_step + steps) * Load::kStep;

  // 4. Sums of a part of the depth, for another kernel to add up.
  if (args.sums) {
    float* sums = args.sums + work.split * g.pixels() * g.k;
    if (plain) {
      for (int i = thread; i < tile.rows() * tile.columns(); i += Tile::kThreads) {
        const int row = i / tile.columns(), column = i % tile.columns();
        sums[tile.at(row, column)] =
            plain_sum<T>(g, args, work, work.pixel + row, work.channel + column, depth_begin, depth_end);
      }
      return;
    }
    for_pairs([&](const float* d, int row, int column) {
      if (row >= tile.rows()) return;
      if (column + 1 < tile.columns() && g.k % 2 == 0 && g.group_k % 2 == 0) {
        store_global(sums + tile.at(row, column), Pack<float, 2>{d[0], d[1]});
      } else {
        for (int e = 0; e < 2; ++e)
          if (column + e < tile.columns()) sums[tile.at(row, column + e)] = d[e];
      }
    });
    return;
  }

  // 5. The epilogue: in registers, then, rounded, in place of the residual.
  if (plain) {
    for (int i = thread; i < tile.rows() * tile.columns(); i += Tile::kThreads) {
      const int row = i / tile.columns(), column = i % tile.columns();
      float y = plain_sum<T>(g, args, work, work.pixel + row, work.channel + column, depth_begin, depth_end);
      y = y * vectors[column] + vectors[Tile::kN + column];
      if (residual) y += static_cast<float>(*tile.element(row, column));
      for_act(args.act, [&](auto code) { y = activate<code()>(y); });
      *tile.element(row, column) = static_cast<T>(y);
    }
  } else {
    for_pairs([&](float* d, int row, int column) {
      const auto added = residual ? load_pack<T, 2>(tile.element(row, column)) : Pack<T, 2>{};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        d[e] = d[e] * vectors[column + e] + vectors[Tile::kN + column + e];
        if (residual) d[e] += static_cast<float>(added.data[e]);
      }
    });
    for_act(args.act, [&](auto code) {
      for_pairs([&](float* d, int, int) {
        d[0] = activate<code()>(d[0]);
        d[1] = activate<code()>(d[1]);
      });
    });
    for_pairs([&](const float* d, int row, int column) {
      store_pack(tile.element(row, column), Pack<T, 2>{static_cast<T>(d[0]), static_cast<T>(d[1])});
    });
  }
  __syncthreads();
  if (args.partials) {
    const std::int64_t first = work.pixel / Tile::kM * 3 * g.k + work.group * g.group_k + work.channel;
    store_moments(tile, memory + (steps + Tile::kStages - 1) % Tile::kStages * Tile::kStageBytes, args.partials + first,
                  g.k);
  }
  tile.store(static_cast<T*>(args.out));
}

using ConvLaunch = void (*)(const Launcher&, const ConvShape&, const ConvArgs&);

template <class A, class Tile, bool kAligned>
void launch_tile(const Launcher& launch, const ConvShape& g, const ConvArgs& args) {
  launch(implicit_gemm_kernel<A, Tile, kAligned>, count_blocks(g, Tile::kM, Tile::kN), Tile::kThreads,
         Tile::kSharedBytes, g, args);
}

// The tile of kM x kN, null: there is none. Each pair of an arithmetic and its tiles is a file, compiled by itself.
template <class A>
ConvLaunch find_tile(std::int64_t m, std::int64_t n, bool aligned) {
  if (!aligned) return m == 64 && n == 64 ? launch_tile<A, Tile<64, 64, 2, 2, 4>, false> : nullptr;
  if (m == 128 && n == 128) return launch_tile<A, Tile<128, 128, 2, 4, 3>, true>;
  if (m == 128 && n == 64) return launch_tile<A, Tile<128, 64, 2, 2, 3>, true>;
  if (m == 64 && n == 64) return launch_tile<A, Tile<64, 64, 2, 2, 4>, true>;
  if constexpr (sizeof(typename A::Element) == 2) {
    if (m == 256 && n == 64) return launch_tile<A, Tile<256, 64, 4, 2, 3>, true>;
    if (m == 64 && n == 128) return launch_tile<A, Tile<64, 128, 2, 2, 3>, true>;
  }
  return nullptr;
}

ConvLaunch find_bf16_tile(std::int64_t m, std::int64_t n, bool aligned);
ConvLaunch find_fp16_tile(std::int64_t m, std::int64_t n, bool aligned);
ConvLaunch find_tf32_tile(std::int64_t m, std::int64_t n, bool aligned);
ConvLaunch find_fp32_tile(std::int64_t m, std::int64_t n, bool aligned);

}  // namespace fused_resnet::cuda
