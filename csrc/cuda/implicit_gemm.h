// out[m, n] = act(sum_d a[m, d] * b[n, d] * scale[n] + shift[n] + residual[m, n]): a convolution as a GEMM over output
// pixels m, output channels n and depth d = (filter row, filter column, input channel), whose matrix a is never made:
// each chunk of 16 bytes of a row is copied from the image, or zero, while the tensor cores multiply earlier ones.
//
// A block computes a Tile of pixels x channels by mma.sync, accumulated in fp32. Copies (cp.async) run kStages - 1
// steps ahead. Where they have no steps left, the residual's tile follows in their place; the results are put there
// too, so that they leave in 16 bytes a thread and whole rows a warp.
#pragma once

#include "cuda/implicit_gemm_loader.h"
#include "cuda/implicit_gemm_output.h"
#include "cuda/launch.h"
#include "cuda/products.h"

namespace fused_resnet::cuda {

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
