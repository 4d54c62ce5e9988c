#include "cuda/implicit_gemm.h"

#include <algorithm>

#include "cuda/affine.h"
#include "cuda/kernels.h"

namespace fused_resnet::cuda {
namespace {

constexpr int kThreads = 256;

// out[m, n] = act(sum_s sums[s, m, n] * scale[n] + shift[n] + residual[m, n]), the splits s in their order, in fp32.
// A thread takes kN channels of a pixel.
template <class T, int kN>
__global__ void __launch_bounds__(kThreads)
    implicit_gemm_sum_kernel(const float* sums, int splits, const float* scale, const float* shift, const T* residual,
                             T* out, std::int64_t count, std::int64_t k, int act) {
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (at >= count) return;
  const int channel = static_cast<int>(at % k);
  auto total = load_pack<float, kN>(sums + at);
#pragma unroll 4
  for (int s = 1; s < splits; ++s) {
    const auto part = load_pack<float, kN>(sums + s * count + at);
#pragma unroll
    for (int e = 0; e < kN; ++e)
      total.data[e] += part.data[e];
  }
  Pack<T, kN> added{}, y;
  if (residual) added = load_pack<T, kN>(residual + at);
#pragma unroll
  for (int e = 0; e < kN; ++e) {
    total.data[e] = total.data[e] * (scale ? scale[channel + e] : 1.0f) + (shift ? shift[channel + e] : 0.0f);
    if (residual) total.data[e] += static_cast<float>(added.data[e]);
  }
  activate_all(total.data, act);
#pragma unroll
  for (int e = 0; e < kN; ++e)
    y.data[e] = static_cast<T>(total.data[e]);
  store_global(out + at, y);
}

// Positions in an image, and taps, are kept in 16 bits; the places of a weight in 32.
ConvShape shape_of(const Arguments& args, const Tensor& x, const Tensor& weight, const Tensor& out,
                   const std::vector<std::int64_t>& geometry) {
  args.image(x, "x");
  const auto map = args.map(x, geometry, 9);
  for (int i = 0; i < 2; ++i) {
    args.number(x.size(2 + i) + 2 * geometry[4 + i], 1, "x's padded height or width", INT16_MAX);
    args.number(geometry[i] * geometry[6 + i], 1, "geometry's window times its dilation", INT16_MAX);
  }
  const std::int64_t groups = geometry[8];
  args.number(groups, 1, "geometry's groups");
  if (x.size(1) % groups) args.refuse("x", x, "as many channels as " + std::to_string(groups) + " groups share,");
  const std::int64_t size = geometry[0] * geometry[1] * (x.size(1) / groups);
  if (weight.dim() != 2 || weight.size(0) % groups || weight.size(1) < size ||
      weight.size(1) * weight.element_size() % kChunkBytes)
    args.refuse("weight", weight,
                "[K, at least " + std::to_string(size) + ", filled up to whole 16 bytes], K of " +
                    std::to_string(groups) + " groups,");
  args.matrix(weight, x.scalar_type(), weight.size(0), weight.size(1), "weight");
  args.number(weight.numel(), 1, "the size of weight", INT32_MAX - 1024);  // steps end behind it
  args.image(out, x, {x.size(0), weight.size(0), map[0], map[1]}, "out");
  const auto fits = [](std::int64_t value) { return static_cast<int>(value); };
  ConvShape g{};
  g.n = fits(x.size(0)), g.c = fits(x.size(1)), g.h = fits(x.size(2)), g.w = fits(x.size(3));
  g.k = fits(out.size(1)), g.p = fits(out.size(2)), g.q = fits(out.size(3));
  g.r = fits(geometry[0]), g.s = fits(geometry[1]);
  g.stride_h = fits(geometry[2]), g.stride_w = fits(geometry[3]);
  g.pad_h = fits(geometry[4]), g.pad_w = fits(geometry[5]);
  g.dilation_h = fits(geometry[6]), g.dilation_w = fits(geometry[7]);
  g.groups = fits(groups);
  g.group_c = g.c / g.groups, g.group_k = g.k / g.groups;
  g.depth = fits(weight.size(1));
  return g;
}

ConvLaunch find(const Tensor& x, bool tf32, std::int64_t m, std::int64_t n, bool aligned) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return find_bf16_tile(m, n, aligned);
    case ScalarType::Half:
      return find_fp16_tile(m, n, aligned);
    default:
      return tf32 ? find_tf32_tile(m, n, aligned) : find_fp32_tile(m, n, aligned);
  }
}

}  // namespace

void conv(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
          std::optional<Tensor> residual, std::vector<std::int64_t> geometry, std::int64_t act, bool tf32,
          std::int64_t tile_m, std::int64_t tile_n, Tensor out, std::optional<Tensor> sums,
          std::optional<Tensor> partials) {
  const Arguments arguments("conv", x);
  ConvShape g = shape_of(arguments, x, weight, out, geometry);
  arguments.vector(scale, g.k, "scale", sizeof(float));
  arguments.vector(shift, g.k, "shift", sizeof(float));
  arguments.like(residual, out, "residual");
  arguments.activation(act);
  const int chunk = kChunkBytes / static_cast<int>(x.element_size());
  const bool aligned = g.group_c % chunk == 0;
  const ConvLaunch tile = find(x, tf32, tile_m, tile_n, aligned);
  if (!tile) arguments.refuse("tile", std::to_string(tile_m) + " x " + std::to_string(tile_n), "one of find_tile's");
  // From a tile's first image on, chunks are counted in 32 bits.
  const std::int64_t images = std::min<std::int64_t>(g.n, tile_m / g.map() + 2);
  if (aligned) arguments.number(x.numel() / g.n / chunk * images, 1, "16 bytes of the images of a tile");
  g.splits = 1;
  if (sums) {
    if (partials) arguments.refuse("partials", "given", "None beside sums");
    const std::int64_t splits = sums->dim() ? sums->size(0) : 0;
    arguments.number(splits, 1, "the splits of sums", ceil_div(g.depth, kRowChunks * chunk));
    arguments.matrix(*sums, ScalarType::Float, splits, out.numel(), "sums");
    g.splits = static_cast<int>(splits);
  }
  if (partials)
    arguments.matrix(*partials, ScalarType::Float, ceil_div(g.pixels(), tile_m), 3 * static_cast<std::int64_t>(g.k),
                     "partials");
  const Launcher launch(x);
  ConvArgs args{};
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.partials = partials ? floats(*partials) : nullptr;
  if (!sums) {
    args.scale = floats(scale);
    args.shift = floats(shift);
    args.residual = data_or_null(residual);
    args.act = static_cast<int>(act);
    return tile(launch, g, args);
  }
  args.sums = floats(*sums);
  tile(launch, g, args);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    const auto add_up = [&](auto width) {
      launch(implicit_gemm_sum_kernel<T, width()>, ceil_div(out.numel(), kThreads * width()), kThreads, 0, args.sums,
             g.splits, floats(scale), floats(shift), static_cast<const T*>(data_or_null(residual)),
             static_cast<T*>(out.mutable_data_ptr()), out.numel(), g.k, static_cast<int>(act));
    };
    g.k % 4 == 0 ? add_up(std::integral_constant<int, 4>{}) : add_up(std::integral_constant<int, 1>{});
  });
}

}  // namespace fused_resnet::cuda
