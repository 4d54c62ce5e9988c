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

ConvShape shape_of(const Tensor& x, const Tensor& weight, const Tensor& out,
                   const std::vector<std::int64_t>& geometry) {
  STD_TORCH_CHECK(geometry.size() == 9, "conv: geometry is R, S, strides, padding, dilation and groups");
  const auto fits = [](std::int64_t value) {
    STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, "conv: a size beyond 32 bits");
    return static_cast<int>(value);
  };
  ConvShape g{};
  g.n = fits(x.size(0)), g.c = fits(x.size(1)), g.h = fits(x.size(2)), g.w = fits(x.size(3));
  g.k = fits(out.size(1)), g.p = fits(out.size(2)), g.q = fits(out.size(3));
  g.r = fits(geometry[0]), g.s = fits(geometry[1]);
  g.stride_h = fits(geometry[2]), g.stride_w = fits(geometry[3]);
  g.pad_h = fits(geometry[4]), g.pad_w = fits(geometry[5]);
  g.dilation_h = fits(geometry[6]), g.dilation_w = fits(geometry[7]);
  g.groups = std::max(1, fits(geometry[8]));
  g.group_c = g.c / g.groups, g.group_k = g.k / g.groups;
  STD_TORCH_CHECK(std::max({g.h + 2 * g.pad_h, g.w + 2 * g.pad_w, g.r * g.dilation_h, g.s * g.dilation_w}) <= INT16_MAX,
                  "conv: an image or a filter beyond 16 bits");
  g.depth = fits(weight.size(1));
  STD_TORCH_CHECK(out.size(0) == g.n && weight.size(0) == g.k && g.c % g.groups == 0 && g.k % g.groups == 0 &&
                      weight.numel() <= INT32_MAX && g.depth * weight.element_size() % kChunkBytes == 0 &&
                      g.depth >= static_cast<std::int64_t>(g.r) * g.s * g.group_c,
                  "conv: the packed weight does not fit");
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type() && weight.scalar_type() == x.scalar_type(),
                  "conv: x, weight and out must have one dtype");
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
  const Launcher launch(x);
  ConvShape g = shape_of(x, weight, out, geometry);
  g.splits = sums ? static_cast<int>(sums->size(0)) : 1;
  const int chunk = kChunkBytes / static_cast<int>(x.element_size());
  STD_TORCH_CHECK(g.splits <= ceil_div(g.depth, kRowChunks * chunk), "conv: more splits than steps");
  STD_TORCH_CHECK(!sums || (!partials && sums->numel() == g.splits * out.numel()), "conv: sums do not fit");
  STD_TORCH_CHECK(!partials || partials->numel() == ceil_div(g.pixels(), tile_m) * 3 * g.k,
                  "conv: partials do not fit");
  const bool aligned = g.group_c % chunk == 0;
  const ConvLaunch tile = find(x, tf32, tile_m, tile_n, aligned);
  STD_TORCH_CHECK(tile, "conv: there is no tile of ", tile_m, " x ", tile_n);
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
