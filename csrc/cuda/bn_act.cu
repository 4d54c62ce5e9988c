// Batch norm in training, between the statistics of bn_stats.cu: its output, and the passes of its gradient.

#include "cuda/bn_act.h"
#include "cuda/kernels.h"

namespace fused_resnet::cuda {
namespace {

// out = act((x - mean) * scale + shift + residual); bit e of mask[access] is set where the gradient of element e
// passes.
template <class T, int kN, int kAct, bool kResidual>
__global__ void __launch_bounds__(RowGrid::kThreads, kResidual ? 2 : 3) bn_apply_kernel(BnArgs<T> in, RowGrid grid) {
  const RowTile tile(grid, kN, true);
  if (!tile.inside) return;
  const Affine<kN> affine(in, tile);
  for_rows<RowGrid::kAtOnce>(tile, [&](std::int64_t row, auto at_once) {
    constexpr int kRows = at_once();
    Pack<T, kN> x[kRows];
    [[maybe_unused]] Pack<T, kN> residual[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i * tile.lines) * grid.channels + tile.channel;
      x[i] = load_pack<T, kN>(in.x + at);
      if constexpr (kResidual) residual[i] = load_pack<T, kN>(in.residual + at);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = (row + i * tile.lines) * grid.channels + tile.channel;
      float v[kN];
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        v[e] = affine(e, widen(x[i], e));
        if constexpr (kResidual) v[e] += widen(residual[i], e);
        v[e] = limited_activate<kAct>(v[e], in.limits);
      }
      const auto out = narrow<T>(v);
      store_global(in.out + at, out);
      if (!in.mask) continue;
      unsigned bits = 0;
#pragma unroll
      for (int e = 0; e < kN; ++e)
        bits |= static_cast<unsigned>(passes(widen(out, e), in.limits)) << e;
      in.mask[at / kN] = static_cast<std::uint8_t>(bits);
    }
  });
}

// Calls body(integral constant) with kNone for the activations that clamp, else with the activation.
template <class Body>
void with_limited_act(std::int64_t act, const Body& body) {
  if (act == kHardswish) return body(std::integral_constant<int, kHardswish>{});
  if (act == kSilu) return body(std::integral_constant<int, kSilu>{});
  STD_TORCH_CHECK(act == kNone || act == kRelu || act == kRelu6, "unknown activation");
  body(std::integral_constant<int, kNone>{});
}

std::uint8_t* mask_bytes(const std::optional<Tensor>& mask) {
  return mask ? static_cast<std::uint8_t*>(mask->mutable_data_ptr()) : nullptr;
}

void check_mask(const Arguments& args, const std::optional<Tensor>& mask, const Tensor& x, std::int64_t act) {
  if (!mask) return;
  if (act == kHardswish || act == kSilu) args.refuse("mask", "given", "None: it tells only the slope of a clamp");
  const std::int64_t wide = 16 / x.element_size(), width = x.size(1) % wide ? 1 : wide;
  args.matrix(*mask, ScalarType::Byte, 1, x.numel() / width, "mask", 1);
}

void check_gradient(const Arguments& args, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& residual,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& mean,
                    const Tensor& var, std::int64_t act) {
  args.image(x, "x");
  args.like(dy, x, "dy");
  args.like(y, x, "y");
  args.activation(act);
  check_mask(args, mask, x, act);
  args.like(residual, x, "residual");
  args.vector(weight, x.size(1), "weight");
  args.vector(bias, x.size(1), "bias");
  args.vector(mean, x.size(1), "mean");
  args.vector(var, x.size(1), "var");
}

void apply(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& mean,
           const std::optional<Tensor>& var, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
           double eps, std::int64_t act, const Tensor& out, const std::optional<Tensor>& mask) {
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>(x, residual, mean, var, weight, bias, eps, act);
      in.out = static_cast<T*>(out.mutable_data_ptr());
      in.mask = mask_bytes(mask);
      const RowGrid grid(x.numel() / x.size(1), x.size(1), width());
      with_limited_act(act, [&](auto code) {
        launch(residual ? bn_apply_kernel<T, width(), code(), true> : bn_apply_kernel<T, width(), code(), false>,
               grid.blocks(), RowGrid::kThreads, 0, in, grid);
      });
    });
  });
}

// Launches `in`'s pass of the backward over dy, with the slope from where it is cheapest.
template <int kN, class T>
void launch_backward(const Launcher& launch, const BnArgs<T>& in, std::int64_t act, const RowGrid& grid) {
  const StoredGradient<T, kN> source{in.dy};
  if (act == kNone) return launch_bn_backward<kN, Slope::kOne, kNone>(launch, in, source, grid);
  if (in.mask) return launch_bn_backward<kN, Slope::kMask, kNone>(launch, in, source, grid);
  with_limited_act(act, [&](auto code) {
    if constexpr (code() == kNone)
      if (in.y) return launch_bn_backward<kN, Slope::kOutput, kNone>(launch, in, source, grid);
    launch_bn_backward<kN, Slope::kAgain, code()>(launch, in, source, grid);
  });
}

}  // namespace

void bn_apply(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
              std::optional<Tensor> residual, double eps, std::int64_t act, Tensor y, std::optional<Tensor> mask) {
  const Arguments args("bn_apply", x);
  args.image(x, "x");
  args.vector(mean, x.size(1), "mean");
  args.vector(var, x.size(1), "var");
  args.vector(weight, x.size(1), "weight");
  args.vector(bias, x.size(1), "bias");
  args.like(residual, x, "residual");
  args.activation(act);
  args.like(y, x, "y");
  check_mask(args, mask, x, act);
  apply(x, residual, mean, var, weight, bias, eps, act, y, mask);
}

void scale_act(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual, std::int64_t act, Tensor out) {
  const Arguments args("scale_act", x);
  args.image(x, "x");
  args.vector(scale, x.size(1), "scale");
  args.vector(shift, x.size(1), "shift");
  args.like(residual, x, "residual");
  args.activation(act);
  args.like(out, x, "out");
  apply(x, residual, std::nullopt, std::nullopt, scale, shift, 0.0, act, out, std::nullopt);
}

void bn_reduce(Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> mask, std::optional<Tensor> residual,
               std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean, Tensor var, double eps,
               std::int64_t act, std::int64_t tile_rows, Tensor partials, std::optional<Tensor> dresidual) {
  const Arguments args("bn_reduce", x);
  check_gradient(args, dy, x, y, mask, residual, weight, bias, mean, var, act);
  args.partials(partials, x, tile_rows, 2);
  args.like(dresidual, x, "dresidual");
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>(x, residual, mean, var, weight, bias, eps, act);
      in.dy = static_cast<const T*>(dy.const_data_ptr());
      in.y = static_cast<const T*>(data_or_null(y));
      in.mask = mask_bytes(mask);
      in.partials = floats(partials);
      in.dresidual = dresidual ? static_cast<T*>(dresidual->mutable_data_ptr()) : nullptr;
      const RowGrid grid(x.numel() / x.size(1), x.size(1), width(), tile_rows);
      launch_backward<width()>(launch, in, act, grid);
    });
  });
}

void bn_input_grad(Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> mask,
                   std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
                   Tensor mean, Tensor var, Tensor mean_g, Tensor slope, double eps, std::int64_t act, Tensor dx) {
  const Arguments args("bn_input_grad", x);
  check_gradient(args, dy, x, y, mask, residual, weight, bias, mean, var, act);
  args.vector(mean_g, x.size(1), "mean_g");
  args.vector(slope, x.size(1), "slope");
  args.like(dx, x, "dx");
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.size(1), [&](auto width) {
      auto in = bn_args<T>(x, residual, mean, var, weight, bias, eps, act);
      in.dy = static_cast<const T*>(dy.const_data_ptr());
      in.y = static_cast<const T*>(data_or_null(y));
      in.mask = mask_bytes(mask);
      in.mean_g = floats(mean_g);
      in.slope = floats(slope);
      in.out = static_cast<T*>(dx.mutable_data_ptr());
      launch_backward<width()>(launch, in, act, RowGrid(x.numel() / x.size(1), x.size(1), width()));
    });
  });
}

}  // namespace fused_resnet::cuda
