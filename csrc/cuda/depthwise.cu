// Depthwise convolution with scale, shift, residual and activation, and its input gradient, for windows of 3x3 and 5x5.

#include "cuda/affine.h"
#include "cuda/depthwise.h"
#include "cuda/kernels.h"

namespace fused_resnet::cuda {
namespace {

// out[i, p, q, c] = act(sum_rs x[i, p * kStride + r - pad, q * kStride + s - pad, c] w[r, s, c] * scale[c] + shift[c]
// + residual[i, p, q, c]), `turned`: w[kR - 1 - r, kR - 1 - s, c]; out may be the residual.
//
// A strip a thread, in fp32. Each step finishes one row of the output: the kStride rows of the input that it still
// lacks are added to it and to the kUnder - 1 rows below that they reach, whose sums wait in registers. Rows are asked
// for kAhead steps before. Steps come in rounds of kUnder, so that no sum and no row moves between registers.
template <class T, int kN, int kR, int kStride, int kColumns>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_fwd_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* scale_vector,
                         const float* shift_vector, const T* residual, T* out, Depthwise conv, Strips strips,
                         unsigned count, int act, bool turned) {
  constexpr int kUnder = (kR - 1) / kStride + 1;
  constexpr int kAhead = kUnder > 2 && kR == 3 ? 2 : 1;
  constexpr int kWidth = (kColumns - 1) * kStride + kR;
  const unsigned number = blockIdx.x * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const Strip at(strips, number);

  const int top = at.row * kStride - conv.padding[0];
  const int bottom = top + (at.rows - 1) * kStride + kR;
  const std::int64_t image = static_cast<std::int64_t>(at.image) * conv.h * conv.w * conv.channels;
  Rows<T, kN, kWidth> input(x + image, conv.w, conv.channels, at.c, top + kR - kUnder * kStride,
                            at.column * kStride - conv.padding[1], top > 0 ? top : 0,
                            bottom < conv.h ? bottom : conv.h);
  Raw<T, kN> rows[kUnder][kStride][kWidth];
#pragma unroll
  for (int step = 0; step < kAhead; ++step)
#pragma unroll
    for (int t = 0; t < kStride; ++t)
      input.read(rows[step][t]);

  float w[kR * kR][kN], scale[kN], shift[kN];
#pragma unroll
  for (int tap = 0; tap < kR * kR; ++tap) {
    const int from = turned ? kR * kR - 1 - tap : tap;
    const Pack<T, kN> pack = load_pack<T, kN>(weight + static_cast<std::int64_t>(from) * conv.channels + at.c);
#pragma unroll
    for (int e = 0; e < kN; ++e)
      w[tap][e] = static_cast<float>(pack.data[e]);
  }
  load_channels(scale, scale_vector, at.c, 1.0f);
  load_channels(shift, shift_vector, at.c, 0.0f);

  const std::int64_t pitch = static_cast<std::int64_t>(conv.q) * conv.channels;
  std::int64_t to = (static_cast<std::int64_t>(at.image) * conv.p + at.row) * pitch +
                    static_cast<std::int64_t>(at.column) * conv.channels + at.c;
  float sums[kUnder][kColumns][kN] = {};
  for (int round = 0;; round += kUnder) {
#pragma unroll
    for (int phase = 0; phase < kUnder; ++phase) {
      const int row = round + phase - (kUnder - 1);  // of the strip, which this step finishes; those above are none
      if (row >= at.rows) return;
#pragma unroll
      for (int t = 0; t < kStride; ++t)
        input.read(rows[(phase + kAhead) % kUnder][t]);
      Raw<T, kN> residuals[kColumns];
      if (residual && row >= 0) {
#pragma unroll
        for (int u = 0; u < kColumns; ++u)
          if (at.column + u < conv.q) residuals[u].load(residual + to + static_cast<std::int64_t>(u) * conv.channels);
      }
#pragma unroll
      for (int below = 0; below < kUnder; ++below) {
        if (static_cast<unsigned>(row + below) >= static_cast<unsigned>(at.rows)) continue;
#pragma unroll
        for (int t = 0; t < kStride; ++t) {
          const int r = kR - (below + 1) * kStride + t;
          if (r < 0) continue;
#pragma unroll
          for (int u = 0; u < kColumns; ++u)
#pragma unroll
            for (int s = 0; s < kR; ++s)
#pragma unroll
              for (int e = 0; e < kN; ++e)
                sums[(phase + below) % kUnder][u][e] += rows[phase][t][u * kStride + s][e] * w[r * kR + s][e];
        }
      }
      if (row < 0) continue;
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        float (&sum)[kN] = sums[phase][u];
        if (at.column + u < conv.q)
          store_global(out + to + static_cast<std::int64_t>(u) * conv.channels,
                       finish<T>(sum, scale, shift, residuals[u], act));
#pragma unroll
        for (int e = 0; e < kN; ++e)
          sum[e] = 0.0f;
      }
      to += pitch;
    }
  }
}

// The same for any window, stride and dilation, one pixel a thread and no rows kept; `kGradient`: of the input,
// out[i, h, w, c] = sum_rs x[i, p, q, c] w[r, s, c] over all p, q, r, s with p * stride + r * dilation - padding = h
// and likewise across, x being the output's gradient.
template <class T, int kN, bool kGradient>
__global__ void __launch_bounds__(kDepthwiseThreads, 8)
    depthwise_any_kernel(const T* __restrict__ x, const T* __restrict__ weight, const float* scale_vector,
                         const float* shift_vector, const T* residual, T* out, Depthwise conv, Strips strips,
                         unsigned count, int act) {
  const unsigned number = blockIdx.x * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const Strip at(strips, number);
  const int height = kGradient ? conv.p : conv.h, width = kGradient ? conv.q : conv.w;
  // The row or column that a tap reads; negative: none.
  const auto under = [&](int way, int place, int tap) {
    const int reach = tap * conv.dilation[way] - conv.padding[way];
    if constexpr (!kGradient) return place * conv.stride[way] + reach;
    const int padded = place - reach;
    return padded % conv.stride[way] == 0 ? padded / conv.stride[way] : -1;
  };
  float sum[kN] = {};
  for (int r = 0; r < conv.window[0]; ++r) {
    const int h = under(0, at.row, r);
    if (h < 0 || h >= height) continue;
    for (int s = 0; s < conv.window[1]; ++s) {
      const int w = under(1, at.column, s);
      if (w < 0 || w >= width) continue;
      const std::int64_t pixel = (static_cast<std::int64_t>(at.image) * height + h) * width + w;
      const std::int64_t tap = static_cast<std::int64_t>(r) * conv.window[1] + s;
      const Pack<T, kN> a = load_pack<T, kN>(x + pixel * conv.channels + at.c);
      const Pack<T, kN> b = load_pack<T, kN>(weight + tap * conv.channels + at.c);
#pragma unroll
      for (int e = 0; e < kN; ++e)
        sum[e] += static_cast<float>(a.data[e]) * static_cast<float>(b.data[e]);
    }
  }
  float scale[kN], shift[kN];
  load_channels(scale, scale_vector, at.c, 1.0f);
  load_channels(shift, shift_vector, at.c, 0.0f);
  const int across = kGradient ? conv.w : conv.q;
  const std::int64_t pixel = (static_cast<std::int64_t>(at.image) * strips.height + at.row) * across + at.column;
  const std::int64_t to = pixel * conv.channels + at.c;
  Raw<T, kN> added;
  if (residual) added.load(residual + to);
  store_global(out + to, finish<T>(sum, scale, shift, added, act));
}

// out[i, h, w, c] = sum of grad[i, p, q, c] w[r, s, c] over all p, q, r, s with 2 * p + r - pad = h and 2 * q + s - pad
// = w: the input's gradient at a stride of 2.
//
// In padded rows and columns, pair (2 i, 2 i + 1) has the rows i - kReach to i of the gradient under it, the even one
// with the even rows of the filter, the odd one with the odd rows. So a thread slides down the pairs of one pair of
// columns, kN channels, and reads one new row of the gradient a step; fp32.
template <class T, int kN, int kR>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_dgrad_kernel(const T* __restrict__ grad, const T* __restrict__ weight, T* out, Depthwise conv,
                           Strips strips, unsigned count) {
  constexpr int kUnder = (kR + 1) / 2, kReach = kUnder - 1;
  const unsigned number = blockIdx.x * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const Strip at(strips, number);
  // The first pair has the first row that is not padding.
  const int top = at.row + conv.padding[0] / 2, left = at.column + conv.padding[1] / 2;
  const std::int64_t image = static_cast<std::int64_t>(at.image) * conv.p * conv.q * conv.channels;
  Rows<T, kN, kUnder> input(grad + image, conv.q, conv.channels, at.c, top - kReach, left - kReach, 0, conv.p);
  Raw<T, kN> rows[kUnder][kUnder];
#pragma unroll
  for (int i = 0; i < kReach; ++i)
    input.read(rows[i]);
  float w[kR * kR][kN];
#pragma unroll
  for (int tap = 0; tap < kR * kR; ++tap) {
    const Pack<T, kN> pack = load_pack<T, kN>(weight + static_cast<std::int64_t>(tap) * conv.channels + at.c);
#pragma unroll
    for (int e = 0; e < kN; ++e)
      w[tap][e] = static_cast<float>(pack.data[e]);
  }
  for (int round = 0;; round += kUnder) {
#pragma unroll
    for (int phase = 0; phase < kUnder; ++phase) {
      const int pair = round + phase;
      if (pair >= at.rows) return;
      input.read(rows[(phase + kReach) % kUnder]);
#pragma unroll
      for (int odd = 0; odd < 4; ++odd) {  // of the row: odd / 2; of the column: odd % 2
        const int h = 2 * (top + pair) + odd / 2 - conv.padding[0], v = 2 * left + odd % 2 - conv.padding[1];
        if (h < 0 || h >= conv.h || v < 0 || v >= conv.w) continue;
        Pack<T, kN> rounded;
        float sum[kN] = {};
#pragma unroll
        for (int r = odd / 2; r < kR; r += 2)
#pragma unroll
          for (int s = odd % 2; s < kR; s += 2)
#pragma unroll
            for (int e = 0; e < kN; ++e)
              sum[e] += rows[(phase + kReach - r / 2) % kUnder][kReach - s / 2][e] * w[r * kR + s][e];
#pragma unroll
        for (int e = 0; e < kN; ++e)
          rounded.data[e] = static_cast<T>(sum[e]);
        const std::int64_t pixel = (static_cast<std::int64_t>(at.image) * conv.h + h) * conv.w + v;
        store_global(out + pixel * conv.channels + at.c, rounded);
      }
    }
  }
}

// Neighbouring columns of a thread: as many as its registers hold, so that few inputs are loaded and converted twice.
constexpr int columns_of(int window, int stride, int width) {
  if (window == 3) return width == 8 ? 1 : 2;
  return width == 4 ? 1 : stride == 1 ? 4 : 2;
}

struct Tile {
  int rows, channels, threads;

  Tile(const Arguments& args, const std::vector<std::int64_t>& sizes) {
    args.length(sizes, 3, "tile");
    args.number(sizes[0], 1, "tile's rows");
    args.number(sizes[1], 1, "tile's channels");
    args.number(sizes[2], 1, "tile's warps", kDepthwiseThreads / kWarp);
    rows = static_cast<int>(sizes[0]);
    channels = static_cast<int>(sizes[1]);
    threads = static_cast<int>(sizes[2]) * kWarp;
  }
};

// The most channels a thread: 16 bytes, and half of that where the filter fills the registers.
template <class T>
constexpr int most_channels(int window) {
  return window == 3 ? kWide<T> : kWide<T> / 2;
}

struct Epilogue {
  const float *scale = nullptr, *shift = nullptr;
  const void* residual = nullptr;
  int act = kNone;
};

template <class T>
void forward(const Launcher& launch, const T* x, const T* weight, T* out, const Epilogue& end, const Depthwise& conv,
             const Tile& tile, bool turned) {
  const auto* residual = static_cast<const T*>(end.residual);
  const std::int64_t image = static_cast<std::int64_t>(conv.h) * conv.w * conv.channels;
  const std::int64_t image_out = static_cast<std::int64_t>(conv.p) * conv.q * conv.channels;
  const auto run = [&](auto kernel, const Strips& strips, auto... more) {
    for_images(conv.images, strips.of_an_image(), [&](int first, int, unsigned count) {
      launch(kernel, ceil_div(count, tile.threads), tile.threads, 0, x + first * image, weight, end.scale, end.shift,
             residual ? residual + first * image_out : nullptr, out + first * image_out, conv, strips, count, end.act,
             more...);
    });
  };
  const bool found = with_window(conv, [&](auto window, auto stride) {
    constexpr int kMost = most_channels<T>(window());
    with_channels<kMost, kMost / 2, 1>(conv.channels, tile.channels, [&](auto width) {
      constexpr int kColumns = columns_of(window(), stride(), width());
      run(depthwise_fwd_kernel<T, width(), window(), stride(), kColumns>,
          Strips(conv.p, conv.q, conv.channels, tile.rows, kColumns, width()), turned);
    });
  });
  if (found) return;
  STD_TORCH_CHECK(!turned, "a turned filter has a window with a kernel of its own");
  with_channels<kWide<T>, 1>(conv.channels, tile.channels, [&](auto width) {
    run(depthwise_any_kernel<T, width(), false>, Strips(conv.p, conv.q, conv.channels, 1, 1, width()));
  });
}

template <class T>
void input_gradient(const Launcher& launch, const T* grad, const T* weight, T* out, const Depthwise& conv,
                    const Tile& tile) {
  if (conv.is(3, 1) || conv.is(5, 1)) {  // the convolution of the gradient with the filter turned around
    Depthwise turned = conv;
    std::swap(turned.h, turned.p);
    std::swap(turned.w, turned.q);
    for (int i = 0; i < 2; ++i)
      turned.padding[i] = conv.window[i] - 1 - conv.padding[i];
    return forward(launch, grad, weight, out, {}, turned, tile, true);
  }
  const std::int64_t image = static_cast<std::int64_t>(conv.p) * conv.q * conv.channels;
  const std::int64_t image_out = static_cast<std::int64_t>(conv.h) * conv.w * conv.channels;
  const auto run = [&](const Strips& strips, const auto& body) {
    for_images(conv.images, strips.of_an_image(), [&](int first, int, unsigned count) {
      body(ceil_div(count, tile.threads), grad + first * image, out + first * image_out, count);
    });
  };
  const auto strided = [&](auto window) {
    constexpr int kMost = most_channels<T>(window());
    // The pairs from the one with the first row, or column, that is not padding to that with the last.
    const auto pairs = [](int size, int padding) { return (size - 1 + padding) / 2 - padding / 2 + 1; };
    with_channels<kMost, 1>(conv.channels, tile.channels, [&](auto width) {
      const Strips strips(pairs(conv.h, conv.padding[0]), pairs(conv.w, conv.padding[1]), conv.channels, tile.rows, 1,
                          width());
      run(strips, [&](std::int64_t blocks, const T* from, T* to, unsigned count) {
        launch(depthwise_dgrad_kernel<T, width(), window()>, blocks, tile.threads, 0, from, weight, to, conv, strips,
               count);
      });
    });
  };
  if (conv.is(3, 2)) return strided(std::integral_constant<int, 3>{});
  if (conv.is(5, 2)) return strided(std::integral_constant<int, 5>{});
  with_channels<kWide<T>, 1>(conv.channels, tile.channels, [&](auto width) {
    const Strips strips(conv.h, conv.w, conv.channels, 1, 1, width());
    run(strips, [&](std::int64_t blocks, const T* from, T* to, unsigned count) {
      launch(depthwise_any_kernel<T, width(), true>, blocks, tile.threads, 0, from, weight, nullptr, nullptr, nullptr,
             to, conv, strips, count, kNone);
    });
  });
}

}  // namespace

void depthwise_fwd(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                   std::optional<Tensor> residual, std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile,
                   std::int64_t act, Tensor out) {
  const Arguments args("depthwise_fwd", x);
  const Depthwise conv(args, x, "x", out, "out", geometry);
  const Tile sizes(args, tile);
  args.matrix(weight, x.scalar_type(), conv.taps(), conv.channels, "weight");
  args.vector(scale, conv.channels, "scale");
  args.vector(shift, conv.channels, "shift");
  args.like(residual, out, "residual");
  args.activation(act);
  const Launcher launch(x);
  const Epilogue end{floats(scale), floats(shift), data_or_null(residual), static_cast<int>(act)};
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    forward(launch, static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
            static_cast<T*>(out.mutable_data_ptr()), end, conv, sizes, false);
  });
}

void depthwise_dgrad(Tensor grad, Tensor weight, std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile,
                     Tensor dx) {
  const Arguments args("depthwise_dgrad", grad);
  args.image(grad, "grad");
  const Depthwise conv(args, dx, "dx", grad, "grad", geometry);
  const Tile sizes(args, tile);
  args.matrix(weight, grad.scalar_type(), conv.taps(), conv.channels, "weight");
  const Launcher launch(grad);
  with_dtype(grad, [&](auto t) {
    using T = decltype(t);
    input_gradient(launch, static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
                   static_cast<T*>(dx.mutable_data_ptr()), conv, sizes);
  });
}

}  // namespace fused_resnet::cuda
