// The weight gradient of a depthwise convolution, in two stages and a fixed order, so that it is the same every time.

#include "cuda/depthwise.h"
#include "cuda/kernels.h"

namespace fused_resnet::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;  // of a strip

// Adds up the sums of the block's threads that have the same channels, the first thread first, and writes them to
// partial[tap, c]: thread t has the channels c = first + t % lanes * kN.
template <int kTaps, int kN>
FUSED_RESNET_DEVICE void add_up(const float (&sums)[kTaps][kN], float* partial, int first, int lanes, int channels) {
  auto* memory = reinterpret_cast<Pack<float, kN>*>(block_memory());  // [kTaps, kThreads]
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    Pack<float, kN> pack;
#pragma unroll
    for (int e = 0; e < kN; ++e)
      pack.data[e] = sums[tap][e];
    memory[tap * kThreads + threadIdx.x] = pack;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTaps * lanes; i += kThreads) {
    const int tap = i / lanes, lane = i % lanes, c = first + lane * kN;
    if (c >= channels) continue;
    float total[kN] = {};
    for (int thread = lane; thread < kThreads; thread += lanes) {
      const Pack<float, kN> pack = memory[tap * kThreads + thread];
#pragma unroll
      for (int e = 0; e < kN; ++e)
        total[e] += pack.data[e];
    }
#pragma unroll
    for (int e = 0; e < kN; ++e)
      partial[static_cast<std::int64_t>(tap) * channels + c + e] = total[e];
  }
}

// partial[tile, r * kR + s, c] = sum of x[i, p * kStride + r - pad, q * kStride + s - pad, c] grad[i, p, q, c] over the
// strips of a tile: tile t of `tiles` has the strips t * strips / tiles on.
//
// A block has `lanes` vectors of kN channels by kThreads / lanes threads, which take every so many of its strips: one
// column, kRows rows. A thread slides down: each row of x is multiplied with the rows of grad that it reaches, which
// wait in registers, as do the sums, fp32, of all its strips.
template <class T, int kN, int kR, int kStride>
__global__ void __launch_bounds__(kThreads, 3)
    depthwise_wgrad_kernel(const T* __restrict__ grad, const T* __restrict__ x, float* partial, Depthwise conv,
                           Strips strips, std::int64_t count, int tiles, int lanes) {
  constexpr int kUnder = (kR - 1) / kStride + 1;
  const int tile = static_cast<int>(blockIdx.x) % tiles;
  const int first = static_cast<int>(blockIdx.x) / tiles * lanes * kN;
  const int c = first + static_cast<int>(threadIdx.x) % lanes * kN;
  float sums[kR * kR][kN] = {};
  const std::int64_t end = c < conv.channels ? count * (tile + 1) / tiles : 0;
  for (std::int64_t n = count * tile / tiles + threadIdx.x / lanes; n < end; n += kThreads / lanes) {
    const auto column = static_cast<int>(n % strips.groups);
    const std::int64_t above = n / strips.groups;
    const int p = static_cast<int>(above % strips.down) * kRows;
    const std::int64_t image = above / strips.down;
    const int rows = conv.p - p < kRows ? conv.p - p : kRows;

    const int top = p * kStride - conv.padding[0], bottom = top + (rows - 1) * kStride + kR;
    Rows<T, kN, kR> input(x + image * conv.h * conv.w * conv.channels, conv.w, conv.channels, c,
                          top + kR - kUnder * kStride, column * kStride - conv.padding[1], top > 0 ? top : 0,
                          bottom < conv.h ? bottom : conv.h);
    Rows<T, kN, 1> output(grad + image * conv.p * conv.q * conv.channels, conv.q, conv.channels, c, p, column, p,
                          p + rows);
    Raw<T, kN> taps[kUnder][kStride][kR], slopes[kUnder][1], ahead[1];
    const auto read = [&](int to) {
#pragma unroll
      for (int t = 0; t < kStride; ++t)
        input.read(taps[to][t]);
    };
    read(0);
    output.read(slopes[kUnder - 1]);
    for (int round = 0; round < rows + kUnder - 1; round += kUnder) {
#pragma unroll
      for (int phase = 0; phase < kUnder; ++phase) {
        const int row = round + phase - (kUnder - 1);  // the first of grad under these rows of x; those above are none
        read((phase + 1) % kUnder);
        output.read(ahead);
#pragma unroll
        for (int below = 0; below < kUnder; ++below) {
          if (static_cast<unsigned>(row + below) >= static_cast<unsigned>(rows)) continue;
#pragma unroll
          for (int t = 0; t < kStride; ++t) {
            const int r = kR - (below + 1) * kStride + t;
            if (r < 0) continue;
#pragma unroll
            for (int s = 0; s < kR; ++s)
#pragma unroll
              for (int e = 0; e < kN; ++e)
                sums[r * kR + s][e] += taps[phase][t][s][e] * slopes[(phase + below) % kUnder][0][e];
          }
        }
        slopes[phase][0] = ahead[0];
      }
    }
  }
  add_up(sums, partial + static_cast<std::int64_t>(tile) * kR * kR * conv.channels, first, lanes, conv.channels);
}

// The same for any window, stride and dilation: one tap a block, every so many pixels of the tile a thread.
template <class T, int kN>
__global__ void __launch_bounds__(kThreads)
    depthwise_wgrad_any_kernel(const T* __restrict__ grad, const T* __restrict__ x, float* partial, Depthwise conv,
                               int tiles, int lanes) {
  const int taps = conv.window[0] * conv.window[1];
  const int tile = static_cast<int>(blockIdx.x) % tiles, tap = static_cast<int>(blockIdx.x) / tiles % taps;
  const int first = static_cast<int>(blockIdx.x) / tiles / taps * lanes * kN;
  const int c = first + static_cast<int>(threadIdx.x) % lanes * kN;
  const int down = tap / conv.window[1] * conv.dilation[0] - conv.padding[0];
  const int right = tap % conv.window[1] * conv.dilation[1] - conv.padding[1];
  const std::int64_t pixels = static_cast<std::int64_t>(conv.images) * conv.p * conv.q;
  float sums[1][kN] = {};
  const std::int64_t end = c < conv.channels ? pixels * (tile + 1) / tiles : 0;
  for (std::int64_t pixel = pixels * tile / tiles + threadIdx.x / lanes; pixel < end; pixel += kThreads / lanes) {
    const int w = static_cast<int>(pixel % conv.q) * conv.stride[1] + right;
    const int h = static_cast<int>(pixel / conv.q % conv.p) * conv.stride[0] + down;
    if (h < 0 || h >= conv.h || w < 0 || w >= conv.w) continue;
    const std::int64_t image = pixel / conv.q / conv.p;
    Raw<T, kN> a, b;
    a.load(x + ((image * conv.h + h) * conv.w + w) * conv.channels + c);
    b.load(grad + pixel * conv.channels + c);
#pragma unroll
    for (int e = 0; e < kN; ++e)
      sums[0][e] += a[e] * b[e];
  }
  add_up(sums, partial + (static_cast<std::int64_t>(tile) * taps + tap) * conv.channels, first, lanes, conv.channels);
}

// dweight[c, tap] = sum of partial[t, tap, c] over all tiles t, in fp64. A block has kWarp neighbouring values of
// [tap, c], one a lane; its warps take every so many tiles, and their sums are added in order.
__global__ void __launch_bounds__(kThreads)
    depthwise_wgrad_reduce_kernel(const float* partial, float* dweight, int tiles, int taps, int channels) {
  constexpr int kWarps = kThreads / kWarp;
  auto* memory = reinterpret_cast<double*>(block_memory());  // [kThreads]
  const std::int64_t size = static_cast<std::int64_t>(taps) * channels;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  double sum = 0;
  if (i < size) {
#pragma unroll 8
    for (int tile = warp; tile < tiles; tile += kWarps)
      sum += static_cast<double>(partial[tile * size + i]);
  }
  memory[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || i >= size) return;
  for (int other = 1; other < kWarps; ++other)
    sum += memory[other * kWarp + threadIdx.x];
  dweight[i % channels * taps + i / channels] = static_cast<float>(sum);
}

template <class T>
void partial_sums(const Launcher& launch, const T* grad, const T* x, float* partial, const Depthwise& conv, int tiles) {
  // Calls body(blocks of channels, lanes): as many lanes as vectors of channels, up to a warp.
  const auto across = [&](int width, const auto& body) {
    const int vectors = conv.channels / width;
    int lanes = 1;
    while (lanes < kWarp && lanes < vectors)
      lanes *= 2;
    body(ceil_div(vectors, lanes), lanes);
  };
  const bool found = with_window(conv, [&](auto window, auto stride) {
    constexpr int kMost = window() == 3 ? kWide<T> : 2;
    with_channels<kMost, 1>(conv.channels, kMost, [&](auto width) {
      const Strips strips(conv.p, conv.q, conv.channels, kRows, 1, width());
      const std::int64_t count = static_cast<std::int64_t>(conv.images) * strips.down * strips.groups;
      constexpr std::size_t kShared = sizeof(float) * window() * window() * width() * kThreads;
      across(width(), [&](std::int64_t blocks, int lanes) {
        launch(depthwise_wgrad_kernel<T, width(), window(), stride()>, blocks * tiles, kThreads, kShared, grad, x,
               partial, conv, strips, count, tiles, lanes);
      });
    });
  });
  if (found) return;
  with_channels<kWide<T>, 1>(conv.channels, kWide<T>, [&](auto width) {
    across(width(), [&](std::int64_t blocks, int lanes) {
      launch(depthwise_wgrad_any_kernel<T, width()>, blocks * conv.window[0] * conv.window[1] * tiles, kThreads,
             sizeof(float) * width() * kThreads, grad, x, partial, conv, tiles, lanes);
    });
  });
}

}  // namespace

void depthwise_wgrad(Tensor grad, Tensor x, std::vector<std::int64_t> geometry, Tensor workspace, Tensor dweight) {
  const Arguments args("depthwise_wgrad", grad);
  const Depthwise conv(args, x, "x", grad, "grad", geometry);
  const int taps = static_cast<int>(conv.taps());
  const std::int64_t size = conv.taps() * conv.channels, parts = std::max<std::int64_t>(1, workspace.numel() / size);
  args.matrix(workspace, ScalarType::Float, parts, size, "workspace");
  args.number(parts, 1, "the tiles of workspace");
  args.vector(dweight, size, "dweight");
  const auto tiles = static_cast<int>(parts);
  const Launcher launch(grad);
  with_dtype(grad, [&](auto t) {
    using T = decltype(t);
    partial_sums(launch, static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
                 floats(workspace), conv, tiles);
  });
  launch(depthwise_wgrad_reduce_kernel, ceil_div(size, kWarp), kThreads, sizeof(double) * kThreads, floats(workspace),
         floats(dweight), tiles, taps, conv.channels);
}

}  // namespace fused_resnet::cuda
