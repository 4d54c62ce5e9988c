// Max pooling, alone and behind batch norm and a clamping activation, whose output it then takes without it ever being
// in memory; and the gradients of both.

#include "cuda/max_pool.h"

#include "cuda/bn_act.h"
#include "cuda/kernels.h"

namespace fused_resnet::cuda {
namespace {

// out = the largest tap of each window and argmax its number: the first of equal ones, the last NaN, as in aten. With
// kNormalise the taps are act((x - mean) * scale + shift), rounded to T before they are compared. A thread makes one
// output after the other, of kN channels; with kWindow its kWindow^2 loads are in flight at once, with 0 the window has
// any size.
template <class T, int kN, int kWindow, bool kNormalise>
__global__ void __launch_bounds__(RowGrid::kThreads, 2)
    max_pool_kernel(BnArgs<T> in, Pool pool, std::uint8_t* argmax, RowGrid grid) {
  const RowTile tile(grid, kN, kNormalise);
  if (!tile.inside) return;
  const Affine<kN> affine(in.norm, tile);
  const Pixels outputs(tile, pool.p, pool.q);
  for_rows<1>(tile, [&](std::int64_t row, auto) {
    const Pixel at = outputs(row);
    const int h = at.row * pool.stride_h - pool.pad_h, w = at.column * pool.stride_w - pool.pad_w;
    const int first_r = h < 0 ? -h : 0, first_s = w < 0 ? -w : 0;
    float best[kN];
    Pack<std::uint8_t, kN> taken;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      best[e] = -std::numeric_limits<float>::infinity();
      taken.data[e] = static_cast<std::uint8_t>(first_r * pool.s + first_s);
    }
    const auto load = [&](int r, int s) {
      return load_pack<T, kN>(in.x + ((at.image * pool.h + h + r) * pool.w + w + s) * grid.channels + tile.channel);
    };
    const auto take = [&](const Pack<T, kN>& x, int tap) {
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        float v = widen(x, e);
        if constexpr (kNormalise)
          v = static_cast<float>(static_cast<T>(limited_activate<kNone>(affine(e, v), in.limits)));
        if (v > best[e] || v != v) {
          best[e] = v;
          taken.data[e] = static_cast<std::uint8_t>(tap);
        }
      }
    };
    if constexpr (kWindow > 0) {
      Pack<T, kN> x[kWindow * kWindow];
      bool inside[kWindow * kWindow];
#pragma unroll
      for (int t = 0; t < kWindow * kWindow; ++t) {
        const int r = t / kWindow, s = t % kWindow;
        inside[t] = h + r >= 0 && h + r < pool.h && w + s >= 0 && w + s < pool.w;
        if (inside[t]) x[t] = load(r, s);
      }
#pragma unroll
      for (int t = 0; t < kWindow * kWindow; ++t)
        if (inside[t]) take(x[t], t);
    } else {
      for (int r = first_r; r < pool.r && h + r < pool.h; ++r)
        for (int s = first_s; s < pool.s && w + s < pool.w; ++s)
          take(load(r, s), r * pool.s + s);
    }
    store_global(in.out + row * grid.channels + tile.channel, narrow<T>(best));
    if (argmax) store_global(argmax + row * grid.channels + tile.channel, taken);
  });
}

// out = dx = the gradients of the windows that took each pixel.
template <class T, int kN, int kCover>
__global__ void __launch_bounds__(RowGrid::kThreads)
    max_pool_bwd_kernel(T* dx, PooledGradient<T, kN, kCover> source, RowGrid grid) {
  const RowTile tile(grid, kN);
  for_rows<1>(tile, [&](std::int64_t row, auto) {
    store_global(dx + row * grid.channels + tile.channel, narrow<T>(source.load(tile, grid, row).sum));
  });
}

std::int64_t rows_of(const Tensor& t) {
  return t.numel() / t.size(1);
}

template <bool kNormalise, class T, int kN>
void launch_max_pool(const Launcher& launch, const BnArgs<T>& in, const Pool& pool, std::uint8_t* argmax,
                     const RowGrid& grid) {
  if constexpr (kN > 1)
    if (pool.r == 3 && pool.s == 3)
      return launch(max_pool_kernel<T, kN, 3, kNormalise>, grid.blocks(), RowGrid::kThreads, 0, in, pool, argmax, grid);
  launch(max_pool_kernel<T, kN, 0, kNormalise>, grid.blocks(), RowGrid::kThreads, 0, in, pool, argmax, grid);
}

// Calls body(source, integral constant): the gradient dy [N, P, Q, C] of x, and the elements of an access.
template <class T, class Body>
void with_pooled_gradient(const Tensor& dy, const Tensor& argmax, const Pool& pool, const Body& body) {
  const auto* grad = static_cast<const T*>(dy.const_data_ptr());
  const auto* taken = static_cast<const std::uint8_t*>(argmax.const_data_ptr());
  with_width<T>(dy.size(1), [&](auto width) {
    if constexpr (width() > 1)
      if (pool.cover() <= 2) return body(PooledGradient<T, width(), 2>{grad, taken, pool}, width);
    body(PooledGradient<T, width(), 0>{grad, taken, pool}, width);
  });
}

std::uint8_t* argmax_bytes(const std::optional<Tensor>& argmax) {
  return argmax ? static_cast<std::uint8_t*>(argmax->mutable_data_ptr()) : nullptr;
}

// Of the batch norm before the pooling, whose activation is a clamp.
void check_norm(const Arguments& args, const Normed& source, std::int64_t act) {
  source.norm.check(args, source.x.size(1), Norm::kOwn);
  args.number(act, kNone, "act", kRelu6);
}

// Launches the pass over the gradient of x that `finish(in)` makes of it; without tile_rows, one that leaves nothing
// behind for each tile.
template <class Finish>
void backward(const Tensor& dy, const Tensor& argmax, const Pool& pool, const Normed& source, std::int64_t act,
              std::int64_t tile_rows, const Finish& finish) {
  const Tensor& x = source.x;
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    auto in = bn_args<T>(source, act);
    finish(in);
    with_pooled_gradient<T>(dy, argmax, pool, [&](auto gradient, auto width) {
      const RowGrid grid(rows_of(x), x.size(1), width(), tile_rows);
      launch_bn_backward<width(), Slope::kAgain, kNone, false>(launch, in, gradient, grid);
    });
  });
}

}  // namespace

void max_pool(Tensor x, std::vector<std::int64_t> geometry, Tensor out, std::optional<Tensor> argmax) {
  const Arguments args("max_pool", x);
  const Pool pool(args, x, "x", out, "out", geometry);
  args.bytes_like(argmax, out, "argmax");
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>({.x = x}, kNone);
      write_to(in.out, out);
      launch_max_pool<false, T, width()>(launch, in, pool, argmax_bytes(argmax),
                                         RowGrid(rows_of(out), x.size(1), width()));
    });
  });
}

void bn_max_pool(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
                 double eps, std::int64_t act, std::vector<std::int64_t> geometry, Tensor out,
                 std::optional<Tensor> argmax) {
  const Arguments args("bn_max_pool", x);
  const Pool pool(args, x, "x", out, "out", geometry);
  const Normed source{.x = x, .norm = {mean, var, weight, bias, eps}};
  check_norm(args, source, act);
  args.bytes_like(argmax, out, "argmax");
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>(source, act);
      write_to(in.out, out);
      launch_max_pool<true, T, width()>(launch, in, pool, argmax_bytes(argmax),
                                        RowGrid(rows_of(out), x.size(1), width()));
    });
  });
}

void max_pool_bwd(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor dx) {
  const Arguments args("max_pool_bwd", dx);
  const Pool pool(args, dx, "dx", dy, "dy", geometry);
  args.bytes_like(argmax, dy, "argmax");
  const Launcher launch(dx);
  with_dtype(dx, [&](auto t) {
    using T = decltype(t);
    with_pooled_gradient<T>(dy, argmax, pool, [&](auto source, auto width) {
      const RowGrid grid(rows_of(dx), dx.size(1), width());
      const auto kernel = max_pool_bwd_kernel<T, width(), source.kMostCover>;
      launch(kernel, grid.blocks(), RowGrid::kThreads, 0, static_cast<T*>(dx.mutable_data_ptr()), source, grid);
    });
  });
}

void bn_max_pool_reduce(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor x, Tensor mean, Tensor var,
                        std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, std::int64_t act,
                        std::int64_t tile_rows, Tensor partials) {
  const Arguments args("bn_max_pool_reduce", x);
  const Pool pool(args, x, "x", dy, "dy", geometry);
  args.bytes_like(argmax, dy, "argmax");
  const Normed source{.x = x, .norm = {mean, var, weight, bias, eps}};
  check_norm(args, source, act);
  args.partials(partials, x, tile_rows, 2);
  backward(dy, argmax, pool, source, act, tile_rows, [&](auto& in) { in.partials = floats(partials); });
}

void bn_max_pool_input_grad(Tensor dy, Tensor argmax, std::vector<std::int64_t> geometry, Tensor x, Tensor mean,
                            Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                            std::int64_t act, Tensor dweight, Tensor dbias, double count, Tensor dx) {
  const Arguments args("bn_max_pool_input_grad", x);
  const Pool pool(args, x, "x", dy, "dy", geometry);
  args.bytes_like(argmax, dy, "argmax");
  const Normed source{.x = x, .norm = {mean, var, weight, bias, eps}};
  const ChannelGradients channels{dweight, dbias, std::nullopt, count};
  check_norm(args, source, act);
  channels.check(args, x.size(1));
  args.like(dx, x, "dx");
  backward(dy, argmax, pool, source, act, 0, [&](auto& in) {
    channels.hand_to(in);
    write_to(in.out, dx);
  });
}

}  // namespace fused_resnet::cuda
